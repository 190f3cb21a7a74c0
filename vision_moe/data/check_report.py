"""The findings over a whole data set, added up."""

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vision_moe.data.examine import Finding, digest

_EXAMPLES = 5


class CheckReport:
    """Adds findings up.

    Args:
        count_tokens: tokens of each caption, special ones included; None leaves tokens out.
        max_tokens: longer captions are cut in training.
    """

    def __init__(
        self, count_tokens: Callable[[Sequence[str]], list[int]] | None = None, max_tokens: int | None = None
    ) -> None:
        self.count_tokens = count_tokens
        self.max_tokens = max_tokens
        self.total = 0
        self.faults: dict[str, dict[str, str]] = {}
        self.damaged_shards: dict[str, str] = {}
        self._forms: Counter[str] = Counter()
        self._traits: Counter[str] = Counter()
        self._fields: Counter[str] = Counter()
        self._widths, self._heights, self._words, self._tokens = (array("L") for _ in range(4))
        self._pictures: dict[int, str] = {}
        self._same_picture: dict[str, list[str]] = {}
        self._captions: set[int] = set()
        self._same_caption: Counter[str] = Counter()

    def add(self, findings: Sequence[Finding]) -> None:
        """Adds some pictures."""
        for finding in findings:
            if finding.kind == "damaged shard":
                self.damaged_shards[finding.name] = finding.reason
                continue
            self.total += 1
            self._fields.update(finding.fields)
            if finding.kind is not None:
                self.faults.setdefault(finding.kind, {})[finding.name] = finding.reason
            else:
                self._add_readable(finding)
        captions = [caption for finding in findings for caption in finding.captions]
        if self.count_tokens is not None and captions:
            self._tokens.extend(self.count_tokens(captions))

    @property
    def unreadable(self) -> int:
        """Pictures that training leaves out."""
        return sum(map(len, self.faults.values()))

    def summary(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {
            "pictures": {"total": self.total, "readable": self.total - self.unreadable, "unreadable": self.unreadable},
            "faults": self.faults,
            "damaged_shards": self.damaged_shards,
            "captions": {"total": len(self._words), "words": _spread(self._words), "tokens": self._token_summary()},
            "duplicates": self._duplicates(),
            "fields": dict(self._fields.most_common()),
            "missing_fields": {field: self.total - n for field, n in self._fields.items() if n < self.total},
            "modes": dict(self._forms.most_common()),
            "traits": dict(self._traits.most_common()),
            "width": _spread(self._widths),
            "height": _spread(self._heights),
        }

    def _add_readable(self, finding: Finding) -> None:
        self._forms[finding.form] += 1
        self._traits.update(finding.traits)
        self._widths.append(finding.size[0])
        self._heights.append(finding.size[1])
        first = self._pictures.setdefault(finding.digest, finding.name)
        if first != finding.name:
            self._same_picture.setdefault(first, []).append(finding.name)
        for caption in finding.captions:
            self._words.append(len(caption.split()))
            number = digest(caption.encode())
            if number in self._captions:
                self._same_caption[caption] += 1
            self._captions.add(number)

    def _token_summary(self) -> dict[str, Any] | None:
        if self.count_tokens is None:
            return None
        cut = None if self.max_tokens is None else int((np.asarray(self._tokens) > self.max_tokens).sum())
        return {**(_spread(self._tokens) or {}), "limit": self.max_tokens, "cut": cut}

    def _duplicates(self) -> dict[str, Any]:
        """Copies beyond the first of each, and the most frequent examples."""
        largest = sorted(self._same_picture.items(), key=lambda item: -len(item[1]))[:_EXAMPLES]
        return {
            "pictures": sum(map(len, self._same_picture.values())),
            "picture_examples": [[first, *others[:_EXAMPLES]] for first, others in largest],
            "captions": self._same_caption.total(),
            "caption_examples": {text: n + 1 for text, n in self._same_caption.most_common(_EXAMPLES)},
        }


def _spread(values: "array[int]") -> dict[str, float] | None:
    if not values:
        return None
    numbers = np.asarray(values)
    quantiles = dict(zip(("min", "median", "p95", "max"), np.percentile(numbers, [0, 50, 95, 100]), strict=True))
    return {name: round(float(value), 1) for name, value in {**quantiles, "mean": numbers.mean()}.items()}
