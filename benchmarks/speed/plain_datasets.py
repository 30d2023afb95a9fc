"""What one writes with `datasets` alone: load text, tokenise in batches, group into blocks. No split, no resume.

    python -m benchmarks.speed.plain_datasets TOKENIZER SEQ_LEN WORKERS CACHE FILE...

After the example for masked language models of transformers (examples/pytorch/language-modeling/run_mlm.py).
"""

from __future__ import annotations

import itertools
import sys

import datasets
from transformers import AutoTokenizer


def main(teacher: str, seq_len: int, workers: int, cache: str, files: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    body = seq_len - 2

    def tokenize(batch: dict) -> dict:
        return tokenizer(
            batch["text"],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )

    def group(batch: dict) -> dict:
        tokens = list(itertools.chain.from_iterable(batch["input_ids"]))
        blocks = [tokens[start : start + body] for start in range(0, len(tokens) // body * body, body)]
        return {"input_ids": [[tokenizer.cls_token_id, *block, tokenizer.sep_token_id] for block in blocks]}

    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache)
    common = {"batched": True, "num_proc": workers, "load_from_cache_file": False}
    rows = rows.map(tokenize, batch_size=100, remove_columns=rows.column_names, **common)
    rows = rows.map(group, batch_size=100, remove_columns=rows.column_names, **common)
    print(f"{len(rows)} blocks")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
