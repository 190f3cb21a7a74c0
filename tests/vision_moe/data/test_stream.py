"""Streams: who reads what, in which order, and that a resumed stream gives what an unbroken one would."""

import itertools
import json
from collections import Counter

import datasets
import pytest
import torch
from PIL import Image

from vision_moe.data.archive import DamagedShardError
from vision_moe.data.hf import stream_hf
from vision_moe.data.read_config import ReadConfig
from vision_moe.data.shard_source import find_shards
from vision_moe.data.stream import CaptionStream
from vision_moe.data.stream_loader import StreamLoader, load_state, save_state
from vision_moe.data.tar_shards import TarShards


def numbers(samples):
    """The collator of these tests: the number in each caption."""
    return {"numbers": torch.tensor([int(sample["caption"].split()[1]) for sample in samples])}


@pytest.fixture
def stream_of(numbered_shards):
    def make(rank=0, world_size=1, shuffle_buffer=3, **fields):
        reader = TarShards(find_shards(str(numbered_shards), "train"))
        config = ReadConfig(**{"max_unreadable_share": 1.0, **fields})
        return CaptionStream(reader, config, shuffle_buffer=shuffle_buffer, rank=rank, world_size=world_size)

    return make


def load(stream, num_batches, batch_size=4, num_workers=0, state=None):
    loader = StreamLoader(stream, numbers, batch_size=batch_size, num_workers=num_workers, state=state)
    batches = [batch["numbers"].tolist() for batch in itertools.islice(loader, num_batches)]
    return batches, json.loads(json.dumps(loader.state()))


def test_an_epoch_holds_every_picture_once_in_a_new_order(stream_of):
    batches, _ = load(stream_of(), 10)
    seen = list(itertools.chain(*batches))
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert seen[:20] != seen[20:]
    assert seen[:20] != sorted(seen[:20])
    assert load(stream_of(), 10)[0] == batches


def test_pictures_belong_to_their_captions(stream_of):
    for sample in itertools.islice(stream_of(), 20):
        red = sample["image"].getpixel((4, 4))[0]
        assert abs(red - 10 * int(sample["caption"].split()[1])) <= 2


def test_a_buffer_of_one_keeps_the_order_of_each_shard(stream_of):
    batches, _ = load(stream_of(shuffle_buffer=1), 4, batch_size=5)
    assert all(batch == list(range(batch[0], batch[0] + 5)) for batch in batches)
    assert len({batch[0] for batch in batches}) == 4


def test_a_large_buffer_mixes_shards(stream_of):
    batches, _ = load(stream_of(shuffle_buffer=100), 4, batch_size=5)
    assert all(len({number // 5 for number in batch}) > 1 for batch in batches)


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (1, 2), (2, 2)])
def test_ranks_and_workers_share_an_epoch(stream_of, world_size, num_workers):
    rounds = max(1, num_workers) * 20 // (world_size * max(1, num_workers)) // 5
    seen = [load(stream_of(rank, world_size), rounds, 5, num_workers)[0] for rank in range(world_size)]
    assert sorted(itertools.chain(*itertools.chain(*seen))) == list(range(20))


def test_too_few_shards_are_an_error_and_no_idle_worker(stream_of):
    with pytest.raises(ValueError, match=r"4 shards cannot feed 2 processes x 3 workers.*num_workers to at most 2"):
        load(stream_of(0, 2), 1, num_workers=3)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle_buffer", [1, 3, 7, 100])
def test_resuming_after_any_batch_gives_the_rest(stream_of, shuffle_buffer, num_workers):
    # 13 batches of 3 are almost two epochs; no buffer ends where a batch does.
    stop_after = range(14) if num_workers == 0 else (1, 4)
    unbroken, _ = load(stream_of(shuffle_buffer=shuffle_buffer), 13, 3, num_workers)
    for stop in stop_after:
        first, state = load(stream_of(shuffle_buffer=shuffle_buffer), stop, 3, num_workers)
        rest, _ = load(stream_of(shuffle_buffer=shuffle_buffer), 13 - stop, 3, num_workers, state)
        assert first + rest == unbroken


def test_a_state_is_of_one_rank_and_refused_by_another_plan(stream_of, tmp_path):
    loader = StreamLoader(stream_of(1, 2), numbers, batch_size=2)
    next(iter(loader))
    save_state(loader, tmp_path)
    state = load_state(tmp_path, 1)
    assert state == loader.state()
    with pytest.raises(FileNotFoundError, match=r"stream_0\.json is missing"):
        load_state(tmp_path, 0)
    for stream in (stream_of(1, 4), stream_of(1, 2, shuffle_buffer=9)):
        with pytest.raises(ValueError, match=r"then, .* now"):
            StreamLoader(stream, numbers, batch_size=2, state=state)
    with pytest.raises(ValueError, match="workers 1 then, 2 now"):
        StreamLoader(stream_of(1, 2), numbers, batch_size=2, num_workers=2, state=state)


def test_captions_are_drawn_anew_each_epoch_by_weight(stream_of):
    stream = stream_of(caption_weights={"caption": 0.5, "re_caption": 0.5})
    drawn = [sample["caption"] for sample in itertools.islice(stream, 100)]
    words = Counter(caption.split()[0] for caption in drawn)
    assert min(words["number"], words["again"]) > 30
    assert drawn == [sample["caption"] for sample in itertools.islice(stream, 100)]
    # The draw depends on the picture and the epoch, and not on who reads it.
    halves = [stream_of(rank, 2, caption_weights=stream.config.caption_weights) for rank in range(2)]
    assert sorted(c for half in halves for c in [s["caption"] for s in itertools.islice(half, 10)]) == sorted(
        drawn[:20]
    )


def spoil(folder, keys):
    """Cuts pictures short without touching the archive around them."""
    for shard in folder.glob("*.tar"):
        content = shard.read_bytes()
        for key in keys:
            place = content.find(f"{key}.jpg".encode())
            if place >= 0:
                content = content[: place + 512] + b"\0" * 64 + content[place + 512 + 64 :]
        shard.write_bytes(content)


def test_unreadable_pictures_are_skipped_named_and_counted(stream_of, numbered_shards, caplog):
    spoil(numbered_shards, ["000000003", "000020011"])
    loader = StreamLoader(stream_of(), numbers, batch_size=6)
    batches = [batch["numbers"].tolist() for batch in itertools.islice(loader, 6)]
    seen = Counter(itertools.chain(*batches))
    assert seen == {number: 2 for number in range(20) if number not in (3, 11)}
    assert loader.counts()[1:].tolist() == [4, 0]
    assert "skipped: 00000.tar/000000003" in caplog.text


def test_resuming_among_unreadable_pictures_counts_each_once(stream_of, numbered_shards):
    spoil(numbered_shards, ["000000003", "000020011"])
    unbroken, end = load(stream_of(), 12, 3)
    for stop in range(12):
        first, state = load(stream_of(), stop, 3)
        rest, resumed_end = load(stream_of(), 12 - stop, 3, state=state)
        assert first + rest == unbroken
        assert resumed_end == end


def test_more_unreadable_pictures_than_allowed_are_an_error(stream_of, numbered_shards):
    spoil(numbered_shards, ["000000003"])
    # One of at least a thousand: 0.1 %.
    load(stream_of(max_unreadable_share=0.001), 4)
    with pytest.raises(ValueError, match=r"1 of \d+ pictures cannot be read, the last one 00000\.tar/000000003"):
        load(stream_of(max_unreadable_share=0.0005), 5)


def test_a_stream_without_any_readable_picture_ends(stream_of):
    with pytest.raises(ValueError, match=r"no readable picture in 4 shards"):
        load(stream_of(caption_field="url"), 1)


def test_a_damaged_shard_is_an_error_or_left_at_the_damage_and_counted(stream_of, numbered_shards, caplog):
    shard = numbered_shards / "00001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: whole.index(b"000010008.jpg")])
    with pytest.raises(DamagedShardError, match=r"00001\.tar cannot be read to its end.*damaged_shards"):
        load(stream_of(), 5)
    unbroken, end = load(stream_of(damaged_shards="skip"), 16, 2)
    assert Counter(itertools.chain(*unbroken[:17])).keys() == set(range(20)) - {7, 8, 9}
    assert "00001.tar cannot be read to its end, the rest is left out" in caplog.text
    for stop in range(16):
        first, state = load(stream_of(damaged_shards="skip"), stop, 2)
        rest, resumed_end = load(stream_of(damaged_shards="skip"), 16 - stop, 2, state=state)
        assert (first + rest, resumed_end) == (unbroken, end)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_http_streams_in_worker_processes(numbered_shards, serve, num_workers):
    reader = TarShards(find_shards(serve(numbered_shards) + "/{00000..00003}.tar", "train"))
    batches, _ = load(CaptionStream(reader, ReadConfig()), 4, 5, num_workers)
    assert sorted(itertools.chain(*batches)) == list(range(20))


@pytest.fixture
def parquet(tmp_path, encode, monkeypatch):
    """A Hugging Face data set of 3 files with 4 rows each."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "parquet"
    folder.mkdir()
    for file in range(3):
        rows = range(4 * file, 4 * file + 4)
        pictures = [{"bytes": encode(Image.new("RGB", (4, 4), (n, 0, 0))), "path": None} for n in rows]
        table = datasets.Dataset.from_dict({"image": pictures, "caption": [f"number {n}" for n in rows]})
        table.cast_column("image", datasets.Image()).to_parquet(folder / f"train-{file:05d}-of-00003.parquet")
    return folder


@pytest.mark.parametrize("num_workers", [0, 3])
def test_hugging_face_streams_resume_exactly(parquet, num_workers):
    config = ReadConfig(format="hf")

    def stream():
        return CaptionStream(stream_hf(str(parquet), "train", config), config, shuffle_buffer=3)

    unbroken, _ = load(stream(), 9, 2, num_workers)
    assert sorted(itertools.chain(*unbroken[:6])) == list(range(12))
    for stop in range(9) if num_workers == 0 else (4,):
        first, state = load(stream(), stop, 2, num_workers)
        rest, _ = load(stream(), 9 - stop, 2, num_workers, state)
        assert first + rest == unbroken


@pytest.mark.slow
def test_datasets_own_shuffle_loses_its_buffer_on_resumption(parquet):
    """Why the buffer here is our own; drop it when this fails."""

    def shuffled():
        found = datasets.load_dataset(str(parquet), split="train", streaming=True)
        return found.remove_columns("image").shuffle(seed=0, buffer_size=6)

    whole = [row["caption"] for row in shuffled()]
    stream = shuffled()
    first = [row["caption"] for row in itertools.islice(stream, 4)]
    resumed = shuffled()
    resumed.load_state_dict(stream.state_dict())
    rest = [row["caption"] for row in resumed]
    assert first == whole[:4]
    assert set(first + rest) < set(whole)
