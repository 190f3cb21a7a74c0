"""A language model as judge, at any OpenAI-compatible endpoint, and lmms-eval tasks that ask it.

lmms-eval's own judged tasks give a question 0 when its judge fails (MMBench: a random option). Here a question that was
not judged has no score, is counted in `judge_failed`, and too many of them are an error. lmms-eval loads this file by
its path, so it has no siblings to import. The environment says which judge:

    VISION_MOE_JUDGE_URL    base URL, such as https://api.openai.com/v1 or http://127.0.0.1:8000/v1
    VISION_MOE_JUDGE_MODEL  its name at that endpoint
    VISION_MOE_JUDGE_KEY    API key; a local server needs none
    VISION_MOE_JUDGE_CACHE  folder of answers, default ~/.cache/vision_moe/judge
"""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import openai
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.llm_judge import ServerConfig
from lmms_eval.llm_judge.providers.openai import build_sampling_kwargs
from lmms_eval.models.model_utils.usage_metrics import log_usage

from vision_moe.files import write_json

logger = logging.getLogger(__name__)

# Share of questions without a judgement above which a task has no result.
MAX_FAILED = 0.02
# Questions in a row that the endpoint did not answer at all, each already retried, after which it counts as gone.
_GONE_AFTER = 5


class JudgeError(RuntimeError):
    """The judge is not there, refuses us, or judged too little."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Which judge, and how patiently it is asked."""

    url: str
    model: str
    cache: Path
    key: str = "none"
    timeout: float = 60.0
    """Seconds for one request."""
    max_retries: int = 5
    """Further requests after a timeout, 429 or 5xx, with growing pauses or those the server asks for."""
    attempts: int = 3
    """Answers to one question before it counts as unjudged; temperature 0, then 0.5 more each time."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or self.url.rstrip("/").endswith("/chat/completions"):
            raise ValueError(
                f"the judge's URL must be a base URL such as http://127.0.0.1:8000/v1, without /chat/completions, but "
                f"got {self.url!r}; set VISION_MOE_JUDGE_URL"
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "JudgeConfig":
        """Reads the variables named at the head of this file.

        Raises:
            ValueError: URL or model are not set.
        """
        needed = ("VISION_MOE_JUDGE_URL", "VISION_MOE_JUDGE_MODEL")
        if missing := [name for name in needed if not environment.get(name)]:
            raise ValueError(f"this task is judged by a language model: set {' and '.join(missing)}")
        default = Path.home() / ".cache" / "vision_moe" / "judge"
        return cls(
            url=environment[needed[0]],
            model=environment[needed[1]],
            key=environment.get("VISION_MOE_JUDGE_KEY") or "none",
            cache=Path(environment.get("VISION_MOE_JUDGE_CACHE") or default),
        )


class Verdict(NamedTuple):
    """What the judge said of one question; value None: it was not judged, for the reason given.

    `model` is the name under which the endpoint answered, `cached` whether it did so in an earlier run.
    """

    value: Any
    answer: str = ""
    model: str = ""
    cached: bool = False
    reason: str = ""


class Judge:
    """Asks, tries again, and keeps every answer that could be read in a folder of this endpoint and model.

    Threads may share a judge.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._client = openai.OpenAI(
            base_url=config.url, api_key=config.key, timeout=config.timeout, max_retries=config.max_retries
        )
        self._folder = config.cache / _sha256([config.url.rstrip("/"), config.model])[:16]
        self._lock = threading.Lock()
        self._unanswered = 0

    def preflight(self) -> None:
        """Makes sure, before a model works for hours, that the judge can be asked.

        Without cached answers it is asked one question. With some only its list of models is fetched, which asks
        nothing, and an endpoint that is not there is no error: the cache may have all that is needed.

        Raises:
            JudgeError: the endpoint cannot be reached, refuses the key, does not know the model, or answers nothing.
        """
        has_cache = any(self._folder.glob("*.json"))
        try:
            self._client.with_options(max_retries=0).models.list()
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._refusal(error) from error
        except openai.OpenAIError as error:
            # Not every server has this list; whether it answers questions, the next step shows.
            if has_cache:
                logger.warning("judge %s: %s; only cached answers can be used", self._config.url, error)
        try:
            if not has_cache:
                self._request("Reply with the number 1 and nothing else.", 0.0, 256)
        except (openai.OpenAIError, ValueError) as error:
            raise self._refusal(error) from error

    def ask(self, prompt: str, parse: Callable[[str], Any], *, max_tokens: int = 1024) -> Verdict:
        """The judge's answer to a question.

        Args:
            prompt: of one user turn.
            parse: reads an answer; None where it cannot.
            max_tokens: of the answer.

        Raises:
            JudgeError: the endpoint refuses us, or has gone.
        """
        file = self._folder / f"{_sha256([prompt, max_tokens])}.json"
        if file.is_file():
            kept = json.loads(file.read_text(encoding="utf-8"))
            if (value := parse(kept["answer"])) is not None:
                return Verdict(value, kept["answer"], kept["model"], cached=True)
        reason = ""
        for attempt in range(self._config.attempts):
            try:
                answer, model = self._request(prompt, 0.5 * attempt, max_tokens)
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise self._refusal(error) from error
            except openai.OpenAIError as error:
                # The client has tried it several times.
                return self._silent(f"{type(error).__name__}: {error}")
            except ValueError as error:
                reason = str(error)
                continue
            self._unanswered = 0
            if (value := parse(answer)) is not None:
                self._keep(file, {"prompt": prompt, "answer": answer, "model": model, "temperature": 0.5 * attempt})
                return Verdict(value, answer, model)
            reason = f"cannot read {answer[:200]!r}"
        return _not_judged(reason)

    def _request(self, prompt: str, temperature: float, max_tokens: int) -> tuple[str, str]:
        sampling = build_sampling_kwargs(
            ServerConfig(model_name=self._config.model, temperature=temperature, max_tokens=max_tokens)
        )
        response = self._client.chat.completions.create(
            model=self._config.model, messages=[{"role": "user", "content": prompt}], **sampling
        )
        try:
            content = response.choices[0].message.content.strip()
        except (AttributeError, IndexError, TypeError):
            content = ""
        if not content:
            raise ValueError(f"no text in the endpoint's answer {str(response)[:200]!r}")
        model = response.model or self._config.model
        if usage := response.usage:
            log_usage(model, None, usage.prompt_tokens or 0, usage.completion_tokens or 0, source="judge")
        return content, model

    def _keep(self, file: Path, content: dict[str, Any]) -> None:
        # Two threads or processes may have asked the same.
        own = file.with_name(f"{os.getpid()}.part")
        with self._lock:
            write_json(own, content)
            os.replace(own, file)

    def _silent(self, reason: str) -> Verdict:
        with self._lock:
            self._unanswered += 1
            gone = self._unanswered >= _GONE_AFTER
        if gone:
            raise JudgeError(f"the judge at {self._config.url} gave no answer {_GONE_AFTER} times in a row: {reason}")
        return _not_judged(reason)

    def _refusal(self, error: Exception) -> JudgeError:
        return JudgeError(
            f"the judge {self._config.model!r} at {self._config.url} cannot be asked: {type(error).__name__}: {error}; "
            "check VISION_MOE_JUDGE_URL, _MODEL and _KEY"
        )


class JudgedTask(ConfigurableTask):
    """A task whose `process_results` takes a third argument, the judge; it is tried before the model is asked."""

    def __init__(self, config: dict[str, Any]) -> None:
        # lmms-eval writes the metadata into its results.
        judge = {"url": os.environ.get("VISION_MOE_JUDGE_URL"), "model": os.environ.get("VISION_MOE_JUDGE_MODEL")}
        own = {name: value for name, value in config.items() if name != "class"}
        super().__init__(config={**own, "metadata": {**config["metadata"], "judge": judge}})

    def build_all_requests(self, **kwargs: Any) -> None:
        self._judge = Judge(JudgeConfig.from_environment())
        self._judge.preflight()
        super().build_all_requests(**kwargs)

    def process_results(self, doc: dict[str, Any], results: Sequence[str], full_docs: Any = None) -> dict[str, Any]:
        return self.config.process_results(doc, [answer.strip() for answer in results], self._judge)


def failed(flags: Sequence[int]) -> int:
    """How many of the questions (1 for one that was not judged) have no score.

    Raises:
        JudgeError: more than `MAX_FAILED` of them.
    """
    if sum(flags) > MAX_FAILED * len(flags):
        raise JudgeError(
            f"{sum(flags)} of {len(flags)} questions were not judged, more than {MAX_FAILED:.0%}; run again: what was "
            "judged is kept and not asked again"
        )
    return sum(flags)


def _not_judged(reason: str) -> Verdict:
    logger.warning("not judged: %s", reason)
    return Verdict(None, reason=reason)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
