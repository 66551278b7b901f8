"""Round to nearest: every linear of the blocks rounded group by group, no calibration; the floor that every method has to beat.

Run:   python benchmarks/peers/rtn.py --model models/llama --output peers/rtn_g32 --bits 4 --group_size 32 --symmetric False
Environment: the project's own

There is no tool and no file: bytes are those of packed integers, float16 steps and packed zero points; all else as the model has it.
"""

from peer import EMBEDDING, HEAD, LINEARS, Taken, arguments, read_weights, round_to_nearest, rounded_bytes, write_result


def main() -> None:
    args = arguments(__doc__, bits=4, group_size=32, symmetric=False)
    taken, rounded, total = Taken(), {}, 0
    base = read_weights(args.model)
    for name, weight in base.items():
        if name.split(".")[-2] in LINEARS:
            rounded[name] = round_to_nearest(weight, args.bits, args.group_size, args.symmetric)
            total += rounded_bytes(weight.shape, args.bits, args.group_size, args.symmetric)
        else:
            total += 2 * weight.numel()
    tables = {name: 2 * base[name].numel() for name in (EMBEDDING, HEAD) if name in base}
    write_result(args, rounded, "round to nearest", "of this folder", taken.stop(), total, tables)


if __name__ == "__main__":
    main()
