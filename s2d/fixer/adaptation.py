"""Scene adaptation: go on training the compact network for a few steps on pairs from the scene itself.

The pairs are leave-one-out trials (s2d.pairs.trials). They are few, so the steps are short, the weights an average over all
steps (which starts at, and so is pulled back to, where the network was), and whether it helps is judged on trials that
were left out: `judge` adapts to every other trial and repairs the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from s2d.checks import check_range
from s2d.fixer.diffusion import explained_loading
from s2d.fixer.training.losses import FixerLoss, LossWeights
from s2d.fixer.training.pairs import Pair
from s2d.fixer.training.references import NEAREST
from s2d.fixer.training.samples import ImagePrep, PairSamples
from s2d.images import image_info
from s2d.log import progress
from s2d.metrics import find_lpips
from s2d.pairs.trials import TrialPair
from s2d.runs.batches import Sharing, load_batches
from s2d.runs.ema import Ema

# The backbone of LPIPS that takes a third of the other's time; the loss does without it where its weights are not here.
LPIPS_NET = "alex"


@dataclass(frozen=True)
class AdaptSettings:
    """How the network is adapted."""

    num_steps: int
    seed: int = 0
    learning_rate: float = 5e-5
    batch_size: int = 4
    crop: int = 128
    """Side of the windows in pixels, smaller where a photo is."""
    ema_decay: float = 0.98


def check_adaptation(num_steps: int, fixer: str, has_trials: bool) -> None:
    """Refuse --adapt-steps with ValueError where it would do nothing."""
    check_range("adapt_steps", num_steps, 0)
    if num_steps and fixer != "compact":
        raise ValueError(
            f"--adapt-steps: the {fixer} fixer cannot be adapted to a scene. Leave it out, or pass --fixer compact."
        )
    if num_steps and not has_trials:
        raise ValueError(
            "--adapt-steps learns from trials, and there are none here. Leave it out; trials take --trial-views 1 or more, "
            "stage 0's stereo, and three kept photos."
        )


def adapt(
    weights: Path,
    trials: Sequence[TrialPair],
    settings: AdaptSettings,
    target: Path,
    device: torch.device,
    label: str,
) -> Path:
    """Adapt the compact network to trials.

    Args:
        weights: Of the network as it is.
        trials: What to learn from.
        settings: See there.
        target: Gets the adapted weights, in full precision; all or nothing. If it is there already, nothing is done.
        device: Where to compute.
        label: For the progress bar.

    Raises:
        FileNotFoundError, ValueError: no, or no usable weights; photos smaller than the network takes; a loss that is no number.
    """
    if target.is_file():
        return target
    with explained_loading(str(weights)):
        from s2d.fixer.network.compact import load_compact, save_compact

        model = load_compact(weights).to(device, memory_format=torch.channels_last)
    model.requires_grad_(True).train()
    pairs = tuple(as_pair(trial) for trial in trials)
    size = min(settings.crop, *(side for pair in pairs for side in pair.size))
    prep = ImagePrep.parse(f"crop_{size // model.multiple * model.multiple}", model.multiple)
    samples = PairSamples(pairs, prep, settings.seed, cache_bytes=2**28)
    lpips = 1.0 if find_lpips(LPIPS_NET, download=False) else 0.0
    loss = FixerLoss(LossWeights(lpips=lpips), LPIPS_NET).to(device)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=0.0)
    average = Ema(parameters, settings.ema_decay)
    average.num_updates = 10**6  # at its full decay at once: the start is no random one
    batches = load_batches(
        samples, range(settings.num_steps), Sharing(settings.batch_size), 0, device
    )
    with progress(settings.num_steps, label) as bar:
        for step, batch in enumerate(batches):
            fixed = model(
                batch["rendered"],
                batch["guidance"],
                batch["coverage_mask"],
                batch["reference"][:, None],
            )
            found = loss(fixed, batch["target"], step)["loss"]
            if not bool(torch.isfinite(found)):
                raise ValueError(
                    f"Adapting {weights} to the scene: the loss is no number after {step} steps. Pass --adapt-steps 0."
                )
            found.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update()
            bar.update(step + 1, loss=found.detach())
    with average.applied():
        return save_compact(model, target, torch.float32)


def as_pair(trial: TrialPair) -> Pair:
    """A trial as training reads pairs."""
    return Pair(
        name=trial.name,
        rendered=trial.path("render"),
        target=trial.path("truth"),
        guidance=trial.path("guidance"),
        coverage=trial.path("coverage"),
        references=trial.references[:NEAREST],
        size=image_info(trial.path("render")).oriented_size,
    )
