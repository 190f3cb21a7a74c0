"""Scenes, the built-in data set: `python -m vision_moe.data.scenes --out DIR --num N --seed S`.

Writes `train-*.tar` and `test-*.tar` (WebDataset: KEY.jpg, KEY.json), the same pictures under `images/`, the
LLaVA lists `llava_pretrain.json` and `llava_finetune.json` (train pictures), the train pictures in words
(`pictures_in_words.json`, for a language model), POPE's `pope_test.jsonl` (test pictures), and `scenes.json`, which
says what was asked for and is the mark of a finished set. The set is made in a folder beside DIR that is renamed at the
end, so DIR is never half-written.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from vision_moe.command_help import CommandParser
from vision_moe.data.scene_dialogues import Captioned, Record, finetune_records, pope_lines, pretrain_records
from vision_moe.data.scene_factors import FACTOR_VALUES
from vision_moe.data.scene_render import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE
from vision_moe.data.scene_shards import draw_shards, plan_shards

# Raised by any change to what the same arguments write.
GENERATOR_VERSION = 2
MARK = "scenes.json"


@dataclass(frozen=True, kw_only=True)
class ScenesArguments:
    """All that decides the content of a set.

    Raises:
        ValueError: if a number is out of range.
    """

    num: int
    num_test: int
    seed: int = 0
    image_size: int = 64
    shard_size: int = 1000
    only: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low, high in (
            ("num", 1, 999_999),
            ("num_test", 1, 999_999),
            ("seed", 0, 2**63 - 1),
            ("image_size", MIN_IMAGE_SIZE, MAX_IMAGE_SIZE),
            ("shard_size", 1, 999_999),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be in [{low}, {high}], but got {value}")
        for factor, values in self.only.items():
            if factor not in FACTOR_VALUES or not values or set(values) - set(FACTOR_VALUES[factor]):
                known = "; ".join(f"{name}: {', '.join(of)}" for name, of in FACTOR_VALUES.items())
                raise ValueError(f"only must name values of a factor ({known}), but got {factor}={','.join(values)}")


def generate(out: Path, arguments: ScenesArguments, *, num_workers: int = 1, progress: bool = False) -> bool:
    """Write a set to `out` unless it is already there.

    Args:
        out: the folder of the set; must not exist, be empty, or hold a set of the same arguments.
        arguments: what to write.
        num_workers: processes that draw; no influence on the result.
        progress: show a progress bar on stderr.

    Returns:
        whether anything was written.

    Raises:
        ValueError: if `out` holds something else, or num_workers is below 1.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, but got {num_workers}")
    if _is_finished(out, arguments):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.parent / f".{out.name}.{os.getpid()}.partial"
    # Left behind only by a killed run that had our process id.
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        _write_set(work, arguments, num_workers, progress)
        # One step, onto an empty folder too; it fails if another process finished a set there meanwhile.
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return True


def _is_finished(out: Path, arguments: ScenesArguments) -> bool:
    """Whether `out` holds this very set; raises if it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    mark = out / MARK
    if not mark.is_file():
        raise ValueError(f"{out} exists and is not a Scenes set (it has no {MARK}); choose another --out")
    found = json.loads(mark.read_text(encoding="utf-8"))
    got = {"version": found.get("version"), **found.get("arguments", {})}
    wanted = {"version": GENERATOR_VERSION, **asdict(arguments)}
    if got != wanted:
        differ = ", ".join(f"{k}={got.get(k)} (asked for {wanted[k]})" for k in wanted if got.get(k) != wanted[k])
        raise ValueError(f"{out} holds another Scenes set: {differ}; choose another --out or remove that folder")
    return True


def _write_set(folder: Path, arguments: ScenesArguments, num_workers: int, progress: bool) -> None:
    """Draw all pictures, then write the lists that ask about them, then the mark."""
    pictures: dict[str, list[Captioned]] = {"train": [], "test": []}
    sizes = {"train": arguments.num, "test": arguments.num_test}
    shards = [
        shard
        for split, num in sizes.items()
        for shard in plan_shards(
            folder,
            split,
            num,
            seed=arguments.seed,
            image_size=arguments.image_size,
            shard_size=arguments.shard_size,
            only=arguments.only,
        )
    ]
    with tqdm(total=sum(sizes.values()), unit=" pictures", disable=not progress) as bar:
        for shard, drawn in zip(shards, draw_shards(shards, num_workers), strict=True):
            pictures[shard.split] += drawn
            bar.update(len(drawn))
    pretrain = pretrain_records(pictures["train"], arguments.seed)
    finetune = finetune_records(pictures["train"], arguments.seed)
    pope = pope_lines(pictures["test"], arguments.seed)
    _write_list(folder / "llava_pretrain.json", pretrain)
    _write_list(folder / "llava_finetune.json", finetune)
    in_words = {picture.image: [picture.long, picture.cells] for picture in pictures["train"]}
    (folder / "pictures_in_words.json").write_text(json.dumps(in_words, indent=0) + "\n", encoding="utf-8")
    (folder / "pope_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in pope), encoding="utf-8")
    mark = {
        "version": GENERATOR_VERSION,
        "arguments": asdict(arguments),
        "counts": {**sizes, "pretrain": len(pretrain), "finetune": len(finetune), "pope": len(pope)},
        "factors": dict(FACTOR_VALUES),
    }
    (folder / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")


def _write_list(path: Path, records: Sequence[Record]) -> None:
    """Write a JSON list, one record a line."""
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandParser(
        "Draws Scenes, the built-in data set.",
        ".venv/bin/python -m vision_moe.data.scenes --out outputs/scenes --num 8000 --num-test 1000 --seed 1",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the set")
    parser.add_argument("--num", type=int, required=True, help="training pictures")
    parser.add_argument("--num-test", type=int, help="test pictures (default: a tenth of --num, at least 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=64, help="side in pixels, 64 to 336 (default: 64)")
    parser.add_argument("--shard-size", type=int, default=1000, help="pictures per shard (default: 1000)")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="FACTOR=VALUE[,VALUE...]",
        help="draw scenes with these values alone, such as shape=circle,square; may be given for several factors",
    )
    flags = parser.parse_args(argv)
    num_test = max(200, flags.num // 10) if flags.num_test is None else flags.num_test
    try:
        arguments = ScenesArguments(
            num=flags.num,
            num_test=num_test,
            seed=flags.seed,
            image_size=flags.image_size,
            shard_size=flags.shard_size,
            only={factor: values.split(",") for factor, _, values in (part.partition("=") for part in flags.only)},
        )
        written = generate(flags.out, arguments, num_workers=flags.num_workers, progress=sys.stderr.isatty())
    except ValueError as error:
        parser.error(str(error))
    state = "written to" if written else "already in"
    sys.stdout.write(
        f"{arguments.num} train and {num_test} test pictures {state} {flags.out}\n"
        f"  captions       {flags.out}/train-*.tar, {flags.out}/test-*.tar\n"
        f"  LLaVA          {flags.out}/llava_pretrain.json, {flags.out}/llava_finetune.json\n"
        f"  in words       {flags.out}/pictures_in_words.json\n"
        f"  POPE           {flags.out}/pope_test.jsonl\n"
        f"  image folder   {flags.out}/images\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
