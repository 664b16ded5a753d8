"""Speed of data: preparation against the tokenizer alone, and batches against transformers' collator.

    python tools/bench_data.py prepare FILE... [--json]     1 and 2 processes, mpiexec -n 2, tokenizer alone, memory
    python tools/bench_data.py batches DATA [--json]        tokens per second of batches, with and without NSP
    python tools/bench_data.py collator DATA [--json]       batches a second against DataCollatorForLanguageModeling
    python tools/bench_data.py open DATA [--json]           open data set to first batch on 4 billion tokens
    python tools/bench_data.py formats DATA [--json]        random reads: shards, rows by `datasets`, parquet

Each figure is the best of several repeats, on one thread; what is compared is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import psutil
from on_ranks import markdown

BIN = Path(sys.executable).parent
_ROWS = 256


def prepare(files: list[str]) -> list[dict[str, Any]]:
    """Seconds, tokens a second, peak memory and digest of each way to prepare the files, and of the tokenizer alone."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        words = [word for file in files for word in ("--source", file)]
        dsbert = [sys.executable, "-m", "dsbert"]
        first = [*dsbert, "prepare", *words, "--to", str(root / "trained"), "--vocab-size", "8192", "--nproc", "2"]
        rows = [_timed("2 processes, tokenizer trained", first)]
        given = ["prepare", *words, "--tokenizer", str(root / "trained" / "tokenizer"), "--json"]
        rows.append(_alone(root / "trained" / "tokenizer", files))
        ways = {
            "1 process": [*dsbert, *given, "--nproc", "1"],
            "2 processes": [*dsbert, *given, "--nproc", "2"],
            "mpiexec -n 2": [str(BIN / "mpiexec"), "-n", "2", *dsbert, *given],
        }
        for name, command in ways.items():
            rows.append(_timed(name, [*command, "--to", str(root / name.split()[0])]))
        return rows


def _timed(name: str, command: list[str]) -> dict[str, Any]:
    """Run a preparation; the peak is that of its largest process, sampled."""
    start = time.perf_counter()
    running = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = 0
    while running.poll() is None:
        peak = max(peak, _largest_descendant(running.pid))
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    assert running.stdout is not None
    summary = json.loads(running.stdout.read())
    speed = summary["tokens"] / seconds
    return {
        "way": name,
        "seconds": seconds,
        "M tokens/s": speed / 1e6,
        "peak MB of a process": peak / 1e6,
        "digest": summary["digest"],
    }


def _largest_descendant(root: int) -> int:
    """Resident bytes of the largest process below `root`, itself included."""
    sizes = [0]
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(root)
        for process in [top, *top.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                sizes.append(process.memory_info().rss)
    return max(sizes)


def _alone(tokenizer: Path, files: list[str]) -> dict[str, Any]:
    """encode_batch_fast on the same sentences, on one thread, with the ids taken."""
    program = f"""
import os, sys, time, json
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from dsbert.data.preparing.corpus import read_documents
from dsbert.data.tokenizer import load_tokenizer
from pathlib import Path
sentences = [sentence for document in read_documents({files!r}) for sentence in document]
tokenizer = load_tokenizer(Path({str(tokenizer)!r}))
start = time.perf_counter()
tokens = 0
for first in range(0, len(sentences), 4096):
    tokens += sum(map(len, tokenizer.encode_batch_fast(sentences[first : first + 4096], add_special_tokens=False)))
seconds = time.perf_counter() - start
print(json.dumps([seconds, tokens]))
"""
    seconds, tokens = json.loads(
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    )
    return {
        "way": "encode_batch_fast alone, 1 thread, text in memory",
        "seconds": seconds,
        "M tokens/s": tokens / seconds / 1e6,
        "peak MB of a process": None,
        "digest": "",
    }


def batches(data: list[str]) -> list[dict[str, Any]]:
    """Tokens a second, padding not counted: the best and the median of many batches, and the share of padding."""
    from dsbert.data.stream import SampleStream

    rows = []
    for nsp in (True, False):
        for seq_len, count in ((128, _ROWS), (512, _ROWS // 4)):
            stream = SampleStream.open(data[0], "train", seq_len, 1, nsp)
            speeds, tokens, positions = [], 0, 0
            for number in range(200):
                start = time.perf_counter()
                batch = stream.batch(number * count, count)
                speeds.append(batch.num_tokens / (time.perf_counter() - start) / 1e6)
                tokens, positions = tokens + batch.num_tokens, positions + batch.input_ids.size
            speeds.sort()
            rows.append(
                {
                    "samples": f"{seq_len} tokens, {'NSP' if nsp else 'no NSP'}",
                    "best M tokens/s": speeds[-1],
                    "median M tokens/s": speeds[len(speeds) // 2],
                    "padding": f"{1 - tokens / positions:.1%}",
                }
            )
    return rows


def collator(data: list[str]) -> list[dict[str, Any]]:
    """Both in turn, so that what else the machine does meets both alike."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    from dsbert.data.stream import SampleStream

    torch.set_num_threads(1)
    stream = SampleStream.open(data[0], "train", 128, 1, nsp=False)
    tokenizer = AutoTokenizer.from_pretrained(Path(data[0]) / "tokenizer")
    examples = []
    for first in range(0, min(stream.num_samples, 40 * 32), 32):
        batch = stream.batch(first, 32)
        ids = batch.input_ids.copy()
        ids.reshape(-1)[batch.mlm_positions] = batch.mlm_labels
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        encoded = tokenizer(texts, return_offsets_mapping=True, truncation=True, padding="max_length", max_length=128)
        for index in range(len(texts)):  # the collator finds words by the gaps between offsets
            examples.append({name: encoded[name][index] for name in ("input_ids", "attention_mask", "offset_mapping")})
    collate = DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True, mlm_probability=0.15)
    theirs: list[float] = []
    ours: list[float] = []
    for batch in _endless(
        lambda: DataLoader(cast(Any, examples), batch_size=32, shuffle=True, collate_fn=collate), theirs, 40
    ):
        del batch
        start = time.perf_counter()
        stream.batch(len(ours) * 32, 32)
        ours.append(time.perf_counter() - start)
    rows = [("transformers' collator, whole_word_mask=True", theirs), ("dsbert", ours)]
    return [
        {"what": name, "batches of 32 x 128 a second, median": 1 / sorted(seconds)[len(seconds) // 2]}
        for name, seconds in rows
    ]


def _endless(make: Any, seconds: list[float], count: int) -> Any:
    iterator = iter(make())
    for _ in range(count):
        start = time.perf_counter()
        batch = next(iterator)
        seconds.append(time.perf_counter() - start)
        yield batch


def open_(data: list[str]) -> list[dict[str, Any]]:
    """The data's shards repeated in the manifest until there are 4 billion tokens; in processes of their own."""
    from dsbert.base.durable import sealed, unsealed
    from dsbert.data.manifest import data_digest, load_manifest

    source = Path(data[0])
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        target = Path(scratch)
        for path in source.iterdir():
            if not path.name.startswith(("spans-", "pairs-", "manifest")):
                (target / path.name).symlink_to(path.resolve())
        manifest = load_manifest(source)
        train = manifest.splits["train"]
        times = -(-4_000_000_000 // train.tokens)
        document = unsealed(json.loads((source / "manifest.json").read_text()))
        split = document["splits"]["train"]
        split["shards"] = split["shards"] * times
        for key in ("documents", "sentences", "tokens"):
            split[key] *= times
        document["digest"] = data_digest(manifest.tokenizer.digest, manifest.splits) + "x"
        (target / "manifest.json").write_text(json.dumps(sealed(document)))
        program = (
            "import sys, time, json; start = time.perf_counter();"
            "from dsbert.data.stream import SampleStream;"
            "stream = SampleStream.open(sys.argv[1], 'train', 128, 1); opened = time.perf_counter();"
            "position = int(float(sys.argv[2]) * stream.num_samples); stream.batch(position, 256);"
            "import resource;"
            "print(json.dumps([opened - start, time.perf_counter() - opened, stream.num_samples,"
            " resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3]))"
        )
        rows = []
        for name, place in (("index built", 0.0), ("start", 0.0), ("middle of epoch 4", 3.5), ("epoch 1000", 999.9)):
            command = [sys.executable, "-c", program, str(target), str(place)]
            opened, first, samples, peak = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            rows.append(
                {
                    "position": name,
                    "open, imports included, s": opened,
                    "first batch s": first,
                    "tokens": split["tokens"],
                    "samples": samples,
                    "peak MB": peak,
                }
            )
        return rows


def formats(data: list[str]) -> list[dict[str, Any]]:
    """Reads of 125 tokens at random places of the same tokens: microseconds each."""
    import datasets
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dsbert.data.shards import TokenStore

    store = TokenStore.open(data[0], "train")
    tokens = store.shards[0].tokens
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(tokens) - 125, 2000)
    out = np.zeros((2000, 125), dtype=np.int64)
    scratch = Path(tempfile.mkdtemp())
    count = len(tokens) // 125
    table = pa.table({"ids": pa.FixedSizeListArray.from_arrays(pa.array(tokens[: count * 125]), 125)})
    pq.write_table(table, scratch / "rows.parquet", row_group_size=1000)
    with pa.OSFile(str(scratch / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    rows_of = datasets.Dataset.from_file(str(scratch / "rows.arrow")).with_format("numpy")
    picks = (starts // 125).tolist()
    parquet = pq.ParquetFile(scratch / "rows.parquet")
    ways = {
        "these shards: slices of the mapped column": lambda: store.gather(
            starts, np.full(2000, 125), out, np.zeros(2000, np.int64)
        ),
        "datasets.Dataset, fixed rows, a batch of 2000": lambda: rows_of[picks],
        "datasets.Dataset, fixed rows, one by one (200)": lambda: [rows_of[pick] for pick in picks[:200]],
        "parquet, row groups of 1000 (20)": lambda: [parquet.read_row_group(pick // 1000) for pick in picks[:20]],
    }
    reads = [2000, 2000, 200, 20]
    rows = []
    for (name, read), number in zip(ways.items(), reads, strict=True):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            read()
            seconds.append(time.perf_counter() - start)
        rows.append({"format": name, "microseconds a read": min(seconds) / number * 1e6})
    shutil.rmtree(scratch)
    return rows


WAYS = {"prepare": prepare, "batches": batches, "collator": collator, "open": open_, "formats": formats}


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=WAYS)
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = WAYS[arguments.what](arguments.paths)
    if arguments.json:
        print(json.dumps(rows))
        return
    print(markdown([{name: _cell(value) for name, value in row.items()} for row in rows]))
    print(f"\npeak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:,.0f} MB")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
