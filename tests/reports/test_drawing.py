"""What stands in pictures as text."""

from dsbert.reports.drawing import Picture, make_logarithmic, new_figure


def test_ticks_of_a_logarithmic_axis_are_numbers() -> None:
    figure, (axes,) = new_figure()
    axes.plot([2e12, 5e12], [1.0, 2.0])
    make_logarithmic(axes.xaxis)
    assert axes.get_xscale() == "log"
    svg = Picture(figure).svg()
    assert "$" not in svg
    assert ">3e+12<" in svg
