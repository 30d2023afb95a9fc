"""Fields and config files: names, numbers, texts, YAML."""

from __future__ import annotations

import os

from case import Case, Workspace

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def field(name: str, override: str, *says: str) -> Case:
    """A value on the command line, on one rank: every rank reads it by itself, before the ranks join."""
    return Case(name, lambda w: w.train(override), says=[override.partition("=")[0], *says], ranks=1)


def yaml_file(name: str, content: str | bytes, *says: str) -> Case:
    """A file for --config."""

    def build(w: Workspace) -> list[str]:
        path = w.folder / "mine.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return w.train("--config", str(path))

    return Case(name, build, says=says or ["mine.yaml"], ranks=1)


def _fifo(w: Workspace) -> list[str]:
    os.mkfifo(w.folder / "pipe.yaml")
    return w.train("--config", str(w.folder / "pipe.yaml"))


def _huge_file(w: Workspace) -> list[str]:
    (w.folder / "huge.yaml").write_text("# nothing\n" * 200_000)
    return w.train("--config", str(w.folder / "huge.yaml"))


CASES = [
    Case("run_dir_is_a_file", lambda w: (w.run_dir.write_text("mine"), w.train())[1], says=["run.dir", "is a file"]),
    Case("teacher_is_nowhere", lambda w: w.train("teacher.name=/nowhere/bert"), says=["teacher.name", "/nowhere/bert"]),
    # names
    field("unknown_field", "train.stepz=3", "did you mean 'steps'"),
    Case("unknown_section", lambda w: w.train("trian.steps=3"), says=["trian", "did you mean 'train'"]),
    field("field_of_a_field", "train.lr.peak=3", "unknown field"),
    Case("recipe_twice", lambda w: w.train("recipe=quickstart", "recipe=paper"), says=["recipe", "allowed is one"]),
    Case("recipe_twice_the_same", lambda w: w.train("recipe=paper", "recipe=paper"), says=["recipe"]),
    Case("recipe_without_name", lambda w: w.train("recipe="), says=["recipe: found ''", "homobert-base"]),
    Case("config_without_value", lambda w: [*w.train(), "--config"], says=["--config: names no file"]),
    Case("config_before_a_flag", lambda w: [*w.train(), "--config", "--check"], says=["--config", "--check"]),
    Case("a_stray_word", lambda w: w.train("quickstart"), says=["quickstart"]),
    # numbers
    field("steps_hexadecimal", "train.steps=0x10", "found '0x10'", "decimal digits"),
    field("steps_underscore", "train.steps=6_0", "found '6_0'"),
    field("steps_sexagesimal", "train.steps=1:30", "found '1:30'"),
    field("steps_octal", "train.steps=0o17", "found '0o17'"),
    field("steps_fraction", "train.steps=2.5", "a whole number"),
    field("steps_quoted", "train.steps='8'", "found '8'"),
    field("vocabulary_of_nothing", "student.vocab=0", "found '0'", "all, corpus and a number"),
    field("vocabulary_exponent", "student.vocab=8e3", "found '8e3'"),
    field("vocabulary_beyond_the_teacher", "student.vocab=99999999", "the teacher has"),
    field("vocabulary_below_its_characters", "student.vocab=9", "special tokens, and the characters"),
    field("steps_text", "train.steps=many", "found 'many'", "in [1, 1000000000]"),
    field("steps_empty", "train.steps=", "found nothing"),
    field("steps_list", "train.steps=[1,2]", "found a list"),
    field("steps_null", "train.steps=null"),
    field("steps_negative", "train.steps=-3", "found -3", "[1, 1000000000]"),
    field("steps_10_to_20", "train.steps=100000000000000000000", "allowed [1, 1000000000]"),
    field("steps_of_5000_digits", "train.steps=" + "9" * 5000, "found '9999"),
    field("correction_steps_10_to_18", "teacher.correction_steps=1000000000000000000", "allowed [0, 1000000000]"),
    field("lr_arabic_digits", "train.lr=٣e-3", "a number in decimal digits"),
    field("lr_not_a_number", "train.lr=nan", "found 'nan'"),
    field("lr_infinite", "train.lr=.inf", "found '.inf'"),
    field("lr_overflows", "train.lr=1e999"),
    field("lr_text", "train.lr=fast", "found 'fast'", "in (0, 10]"),
    field("mask_probability_tiny", "data.mask_probability=1e-300", "allowed [0.0001, 1)"),
    field("mask_probability_one", "data.mask_probability=1", "allowed [0.0001, 1)"),
    field("heldout_fraction_one", "data.heldout_fraction=1", "allowed (0, 1)"),
    field("seq_len_10_to_9", "data.seq_len=1000000000", "allowed [3, 1048576]"),
    field("seed_negative", "train.seed=-1", "[0, 2147483647]"),
    field("seed_too_large", "train.seed=4294967296", "[0, 2147483647]"),
    field("timeout_1e300", "run.rank_timeout_s=1e300", "allowed (0, 10000000]"),
    field("workers_a_million", "data.workers=1000000", "[0, 4096]"),
    field("batch_a_trillion", "train.global_batch_size=1000000000000", "allowed [1, 10000000]"),
    field("loss_weight_huge", "loss.kl=1e30", "allowed [0, 1000000]"),
    field("width_multiple_above_the_width", "pruning.width_multiple=64", "found 64", "hidden size"),
    field("ffn_multiple_above_the_width", "pruning.ffn_multiple=1000", "found 1000"),
    field("head_dim_multiple_above_the_width", "pruning.head_dim_multiple=100", "found 100"),
    field("no_layers", "student.num_hidden_layers=0", "found 0", "allowed are 1 .. 3"),
    field("more_layers_than_the_teacher", "student.num_hidden_layers=4", "found 4", "allowed are 1 .. 3"),
    # other kinds
    field("bool_as_number", "teacher.shard=1", "true or false"),
    field("bool_as_yes", "teacher.shard=yes", "found 'yes'"),
    field("choice_unknown", "pruning.schedule=cubik", "found 'cubik'", "did you mean 'cubic'"),
    field("choice_list", "pruning.schedule=[cubic]", "found a list", "cubic, linear"),
    field("list_of_text", "run.export_milestones=[half]", "found 'half'"),
    field("list_expected", "run.export_milestones=0.5", "a list such as [0.75,0.5]"),
    field("list_unclosed", "run.export_milestones=[0.5", "not valid YAML"),
    field("sources_of_lists", "data.sources=[[a]]", "found a list"),
    field("sources_empty_list", "data.sources=[]", "empty list"),
    field("sources_one_that_is_not_there", "data.sources=/nowhere/text", "/nowhere/text"),
    field("text_column_empty", "data.text_column=", "found nothing"),
    field("name_of_5000_characters", "run.name=" + "n" * 5000, "5000 characters, allowed are 4096"),
    field("name_too_long_for_a_file", "run.name=" + "n" * 300, "300 bytes", "allowed are 255"),
    field("run_dir_of_nobody", "run.dir=~nosuchuser/run", "no user of that name"),
    field("cache_of_nobody", "data.cache_dir=~nosuchuser", "no user of that name"),
    field("teacher_of_nobody", "teacher.name=~nosuchuser/bert", "no user of that name"),
    field("name_with_newline", "run.name=a\nb", "U+000A"),
    field("name_with_nul", "run.name=a\x00b", "U+0000"),
    field("name_with_half_a_surrogate", "run.name=a\udcffb", "U+DCFF"),
    field("teacher_of_5000_characters", "teacher.name=/" + "t" * 5000, "5001 characters"),
    field("name_with_escape", "run.name=\x1b[31mred", "U+001B"),
    field("value_alias_bomb", f"train.steps=[&a [1,1], {'*a,' * 50}]", "found an alias"),
    field("value_deeply_nested", "train.steps=" + "[" * 2000, "nested deeper than 8"),
    field("section_with_unknown_field", "train={stepz: 3}", "did you mean 'steps'"),
    field("section_with_wrong_kind", "train={steps: many}", "train.steps: found 'many'"),
    field("section_as_number", "train=3", "expected sections"),
    # files
    yaml_file("yaml_alias_bomb", LAUGHS, "found an alias"),
    yaml_file("yaml_deeply_nested", "train: " + "[" * 5000, "nested deeper than 8"),
    yaml_file("yaml_number_as_key", "3: 4\n", "found the key '3'"),
    yaml_file("yaml_null_as_key", "~: 4\n", "found the key"),
    yaml_file("yaml_key_twice", "train: {steps: 3}\ntrain: {steps: 4}\n", "has 'train' twice"),
    yaml_file("yaml_field_twice", "train:\n  steps: 3\n  steps: 4\n", "has 'steps' twice"),
    yaml_file("yaml_list_as_key", "? [a, b]\n: 3\n", "found the key a list"),
    yaml_file("yaml_tab", "train:\n\tsteps: 3\n", "not valid YAML", "line 2"),
    yaml_file("yaml_not_utf8", b"train: {steps: \xff}\n", "not UTF-8"),
    yaml_file("yaml_nul", b"train: {steps: 3\x00}\n", "not valid YAML"),
    yaml_file("yaml_python_object", "train: !!python/object/apply:os.system [ls]\n"),
    yaml_file("yaml_hexadecimal", "train: {steps: 0x10}\n", "train.steps: found '0x10'"),
    yaml_file("yaml_two_documents", "train: {steps: 3}\n---\ntrain: {steps: 4}\n", "not valid YAML"),
    yaml_file("yaml_list", "- train\n", "holds a list"),
    yaml_file("yaml_word", "quickstart\n", "holds the value 'quickstart'"),
    yaml_file("yaml_section_is_a_list", "train: [3]\n", "a list"),
    Case("yaml_is_a_pipe", _fifo, says=["--config", "a pipe or device"]),
    Case("yaml_is_a_folder", lambda w: w.train("--config", str(w.text)), says=["--config", "is a folder"]),
    Case("yaml_is_dev_zero", lambda w: w.train("--config", "/dev/zero"), says=["--config", "a pipe or device"]),
    Case("yaml_is_huge", _huge_file, says=["--config", "2000000 bytes"]),
    Case("yaml_is_nowhere", lambda w: w.train("--config=/nowhere.yaml"), says=["--config: cannot read"]),
]
