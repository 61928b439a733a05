"""The statistics that a pass needs: from the model, from disk, or some of both."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from squeezellm_hf.calibration.accumulate import Statistic, accumulate
from squeezellm_hf.calibration.fisher import FisherDiagonal
from squeezellm_hf.calibration.hessian import Hessians, sum_names
from squeezellm_hf.calibration.objectives import Objective, Sample
from squeezellm_hf.calibration.tokens import TokenCounts
from squeezellm_hf.pipeline import siblings
from squeezellm_hf.pipeline.work_dir import WorkDir

FISHER = "fisher"
TOKENS = "tokens"


class Calibration:
    """Takes statistics from a model, pass by pass, and keeps them on disk on the way.

    Args:
        model: not changed.
        linears: all layers of the plan by name. The Fisher sums are of all of them, also of the
            finished ones: those on disk serve other bits, too.
        sequences: token ids, int64 [n_samples, sequence_length], or keyword arguments each.
        shared: see :class:`~squeezellm_hf.calibration.hessian.Hessians`.
        run: where sums are kept.
        progress: show progress bars.
        keep_hessians: keep them on disk, too, when they are complete, for other bits; if there is
            more than one pass, they would fill the disk.
        objective: see :func:`~squeezellm_hf.calibration.accumulate.accumulate`.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        sequences: Sequence[Sample] | Tensor,
        shared: Mapping[str, str],
        run: WorkDir | None,
        progress: bool,
        keep_hessians: bool,
        objective: Objective | None = None,
    ) -> None:
        self._model = model
        self._linears = dict(linears)
        self._sequences = list(sequences)
        self._shared = shared
        self._run = run
        self._progress = progress
        self._keep_hessians = keep_hessians
        self._objective = objective
        self._fisher: FisherDiagonal | None = None
        self._tokens: TokenCounts | None = None
        self._hessians: tuple[dict[str, int], Hessians] | None = None

    def take(
        self, groups: Mapping[str, int], title: str = "Calibrating"
    ) -> tuple[dict[str, Tensor], Hessians | None]:
        """The Fisher sums of all layers, and the Hessians of some.

        Both are collected in the same walk over the data, as far as they are missing.

        Args:
            groups: the layers that need a Hessian, and how many groups.
            title: of the progress bar.
        """
        is_first = self._fisher is None
        fisher = self._fisher = self._fisher or self._start_fisher()
        tokens = self._tokens = self._tokens or self._start_tokens()
        last = self._hessians
        hessians = self._start_hessians(groups) if groups else None
        is_new = hessians is not None and (last is None or last[1] is not hessians)
        self._hessians = None if hessians is None else (dict(groups), hessians)
        labels: dict[str, Statistic] = {FISHER: fisher, TOKENS: tokens}
        if hessians is not None:
            labels[hessian_label(groups)] = hessians
        total = len(self._sequences)
        missing = {name: s for name, s in labels.items() if s.sequences < total}
        if missing:
            first = min(s.sequences for s in missing.values())
            with tqdm(
                total=total, initial=first, desc=title, unit="sequence", disable=not self._progress
            ) as bar:

                def after_sequence(count: int) -> None:
                    bar.update()
                    self._keep(missing, final=count == total)

                accumulate(
                    self._model,
                    self._sequences,
                    list(missing.values()),
                    objective=self._objective,
                    after_sequence=after_sequence,
                )
        if is_first:
            siblings.warn(tokens.sums)
            siblings.complete(fisher.sums, tokens.sums)
        if hessians is not None and is_new:
            siblings.complete(hessians.sums, tokens.sums)
        return fisher.sums, hessians

    def drop(self, groups: Mapping[str, int]) -> None:
        """Forget the Hessians of finished layers, unless they are to be kept."""
        self._hessians = None
        if self._run is not None and groups and not self._keep_hessians:
            self._run.drop_sums(hessian_label(groups))

    def _start_fisher(self) -> FisherDiagonal:
        devices = {name: linear.weight.device for name, linear in self._linears.items()}
        sums, count = self._run.load_sums(FISHER, devices) if self._run else (None, 0)
        return FisherDiagonal(self._linears, sums, count)

    def _start_tokens(self) -> TokenCounts:
        devices = dict.fromkeys(self._linears, torch.device("cpu"))
        sums, count = self._run.load_sums(TOKENS, devices) if self._run else (None, 0)
        return TokenCounts(self._linears, sums, count)

    def _start_hessians(self, groups: Mapping[str, int]) -> Hessians:
        if self._hessians is not None and self._hessians[0] == dict(groups):
            return self._hessians[1]
        self._hessians = None  # frees them before there are others
        linears = {name: self._linears[name] for name in groups}
        names = sum_names(linears, groups, self._shared).values()
        devices = {name: linears[name].weight.device for name in names}
        label = hessian_label(groups)
        sums, count = self._run.load_sums(label, devices) if self._run else (None, 0)
        return Hessians(linears, groups, self._shared, sums, count)

    def _keep(self, statistics: Mapping[str, Any], *, final: bool) -> None:
        if self._run is None:
            return
        for label, statistic in statistics.items():
            # Those that will be dropped soon are not worth a last time.
            last = final and (label in (FISHER, TOKENS) or self._keep_hessians)
            self._run.save_sums(label, statistic.sums, statistic.sequences, final=last)


def hessian_label(groups: Mapping[str, int]) -> str:
    """What the Hessians of a pass are called on disk."""
    return f"hessian-{hashlib.sha256(repr(sorted(groups.items())).encode()).hexdigest()[:8]}"
