"""What is wrong with the samples of a data set, and what they hold."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch.utils.data import Dataset

from mllm.conversation import IGNORE_INDEX
from mllm.data.dataset import LlavaDataset, UnusableSampleError
from mllm.images import read_image


class Finding(NamedTuple):
    """One sample; counts are of the sample as training sees it, cut at max_length.

    Attributes:
        number: of the sample.
        num_tokens: with the tokens of its pictures.
        num_supervised: tokens that are answers.
        num_image_tokens: tokens of its pictures.
        num_cut: tokens beyond max_length.
        num_pictures: pictures it names.
        missing: pictures that are not there, with the reason.
        broken: pictures that cannot be decoded, with the reason.
        unusable: why the sample, its pictures apart, cannot be trained on; None if it can.
        malformed: why the sample is not of LLaVA's form, or trains nothing, at any max_length; None if it is.
    """

    number: int
    num_tokens: int = 0
    num_supervised: int = 0
    num_image_tokens: int = 0
    num_cut: int = 0
    num_pictures: int = 0
    missing: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    unusable: str | None = None
    malformed: str | None = None

    @property
    def is_good(self) -> bool:
        """Whether training takes the sample."""
        return not (self.missing or self.broken or self.unusable or self.malformed)


class Findings(Dataset[Finding]):
    """Item i is what there is to say about sample i.

    Args:
        dataset: the samples.
        decode: read pictures to their end; otherwise only look whether they are there.
    """

    def __init__(self, dataset: LlavaDataset, decode: bool) -> None:
        self.dataset = dataset
        self.decode = decode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Finding:
        try:
            encoded = self.dataset.encoded(number)
            missing, broken = self._pictures(encoded.pictures)
        except UnusableSampleError as error:
            return Finding(number, unusable=str(error))
        except ValueError as error:
            return Finding(number, malformed=str(error))
        return Finding(
            number,
            num_tokens=len(encoded.input_ids),
            num_supervised=sum(label != IGNORE_INDEX for label in encoded.labels),
            num_image_tokens=len(encoded.pictures) * self.dataset.num_image_tokens,
            num_cut=encoded.num_cut,
            num_pictures=len(encoded.pictures),
            missing=missing,
            broken=broken,
        )

    def _pictures(self, names: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        missing, broken = [], []
        for path in map(self.dataset.picture_path, names):
            if not path.is_file():
                missing.append(f"no file {path}")
            elif self.decode:
                try:
                    read_image(path)
                except ValueError as error:
                    broken.append(str(error))
        return tuple(missing), tuple(broken)


@dataclass
class Summary:
    """Findings of many samples, added up; token counts are of the good ones."""

    num_samples: int = 0
    num_good: int = 0
    num_with_picture: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_image_tokens: int = 0
    num_pictures: int = 0
    num_cut_samples: int = 0
    num_cut_tokens: int = 0
    longest: int = 0
    problems: dict[str, list[str]] = field(
        default_factory=lambda: {kind: [] for kind in ("missing", "broken", "unusable", "malformed")}
    )

    def add(self, finding: Finding) -> None:
        """Counts one sample."""
        self.num_samples += 1
        self.num_with_picture += finding.num_pictures > 0
        self.num_pictures += finding.num_pictures
        where = f"sample number {finding.number}"
        self.problems["missing"] += [f"{where}: {reason}" for reason in finding.missing]
        self.problems["broken"] += [f"{where}: {reason}" for reason in finding.broken]
        if finding.unusable is not None:
            self.problems["unusable"].append(f"{where}: {finding.unusable}")
        if finding.malformed is not None:
            self.problems["malformed"].append(f"{where}: {finding.malformed}")
        if finding.is_good:
            self.num_good += 1
            self.num_tokens += finding.num_tokens
            self.num_supervised += finding.num_supervised
            self.num_image_tokens += finding.num_image_tokens
            self.num_cut_samples += finding.num_cut > 0
            self.num_cut_tokens += finding.num_cut
            self.longest = max(self.longest, finding.num_tokens)

    def verdict(self, skips_bad: bool) -> str | None:
        """Why a run on these samples cannot do; None if it can.

        Args:
            skips_bad: the recipe has bad_samples: skip.
        """
        if self.num_supervised == 0:
            return "no sample has anything to train on"
        if self.problems["malformed"]:
            return f"{len(self.problems['malformed'])} malformed samples would stop it"
        num_bad = self.num_samples - self.num_good
        if num_bad and not skips_bad:
            return f"{num_bad} bad samples would stop it; mend them, or leave them out with --bad_samples skip"
        if 2 * num_bad > self.num_samples:
            return f"{num_bad} of {self.num_samples} samples would be skipped, more than half"
        return None
