"""What a run will need and take, before it begins: `dsbert plan`.

run_plan            all of it, from a recipe and the machines that it is to have
plan_lines          the same for people
figures             a number with its unit, how it is known, and its formula
cards               what a rank computes on: data sheets, and files like them
model_size          parameters and sparse layers, from shapes
workload            samples, tokens and predictions of a step, and ranks without any
zero_layout         what ZeRO leaves on a rank
activation_memory   what forward keeps for backward
rank_memory         memory of a rank by part, and the micro-batch that fits
wire_traffic        bytes handed to collectives, and on the wire
costs               seconds of the parts of a run, and FLOPs
card_time           seconds on a card, from its data sheet: estimates
machine_timing      seconds on this machine, from a few steps taken here by timing_worker
goodput             what failures cost, and how often to save
"""
