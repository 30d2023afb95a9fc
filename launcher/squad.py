"""Fine-tune a checkpoint on SQuAD and write its table row, OUT/VERSION/squad.md and squad.json.

    python launcher/squad.py --checkpoint runs/quickstart/export --data /data/squad --out runs/squad
    python launcher/squad.py --checkpoint bert-base-uncased --data /data/squad --version v2.0 --lr 3e-5 5e-5 \
        --seeds 0 1 2 --device cuda --precision bf16 --out runs/squad-bert

--data holds train-v1.1.json and dev-v1.1.json, or v2.0. The same command goes on after an interruption: each finished
run is a file in OUT, beside its answers in the form that the official evaluation script reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from homodistil.cli import exit_with_code
from homodistil.config import DataConfig


def main() -> None:
    arguments = _parser().parse_args()
    with exit_with_code():
        # After parsing, so that --help and mistakes need no heavy imports.
        from homodistil.evaluation.squad.examples import load_squad

        data = load_squad(arguments.data, arguments.version)
        from homodistil.evaluation.glue.grid import Grid
        from homodistil.evaluation.squad.fine_tuning import Settings
        from homodistil.evaluation.squad.grid import run_grid, write_table

        shared = Settings(
            max_length=arguments.max_length,
            stride=arguments.stride,
            max_answer_tokens=arguments.max_answer_tokens,
            null_threshold=arguments.null_threshold,
            device=arguments.device,
            precision=arguments.precision,
        )
        grid = Grid(
            lrs=arguments.lr,
            batch_sizes=arguments.batch_size,
            epochs=arguments.epochs,
            seeds=arguments.seeds,
            shared=shared,
        )
        cache_dir = arguments.cache_dir.expanduser()
        say = lambda line: print(line, flush=True)  # noqa: E731
        records = run_grid(arguments.checkpoint, data, grid, arguments.out, cache_dir, say)
        print(f"\n{write_table(records, arguments.out)}\n{arguments.out / data.version / 'squad.md'}")


def _parser() -> argparse.ArgumentParser:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(description=lines[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder or hub name of a Hugging Face encoder, or embedded:minilm-l6")
    add("--data", type=Path, required=True, help="folder with train-v*.json and dev-v*.json")
    add("--version", choices=("v1.1", "v2.0"), help="needed where the folder holds both")
    add("--lr", type=_positive(float), nargs="+", default=[5e-5], help="learning rates")
    add("--batch-size", type=_positive(int), nargs="+", default=[32], help="batch sizes, in windows")
    add("--epochs", type=_positive(int), nargs="+", default=[2], help="epochs (the learning rate falls over them)")
    add("--seeds", type=int, nargs="+", default=[0], help="seeds of head, order and dropout")
    add("--max-length", type=_positive(int), default=384, help="tokens of a window: question and context")
    add("--stride", type=int, default=128, help="tokens of context that neighbouring windows share")
    add("--max-answer-tokens", type=_positive(int), default=30, help="longest answer")
    add("--null-threshold", type=float, default=0.0, help="v2.0: lead that `no answer` needs over the best answer")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: the first visible GPU")
    add("--out", type=Path, required=True, help="folder for results; what is finished there is not run again")
    add("--cache-dir", type=Path, default=Path(DataConfig().cache_dir), help="where packaged data and models are kept")
    return parser


def _positive(kind: type):
    def number(text: str):
        if not 0 < (value := kind(text)) < float("inf"):
            raise ValueError
        return value

    number.__name__ = f"positive {kind.__name__}"  # argparse's message names it
    return number


if __name__ == "__main__":
    main()
