"""The training step of HEXA_MoCo and HEXA_DCluster in plain PyTorch: what `hexa_jax` is timed beside.

python benchmarks/step.py --peer    starts this file as a process and tells it when to run a turn

Written as a PyTorch user would write it for speed: channels-last, bfloat16 autocast, fused SGD and
torch.compile on CUDA. No `hexa_jax`, no jax. Legend: N images, V crops, S side, D embedding, K
queue or clusters, H heads.
"""

import copy
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from benchmarks.peers.case import Case
from benchmarks.peers.torch_network import Network
from benchmarks.turns import Refusal, serve


@dataclasses.dataclass
class Batch:
    """One step's input on the device: uint8 crops [N, V_r, S, S, 3] per resolution; key crops come in shuffled order.

    Attributes:
        key_row: for each row, the row of `key_crops` that shows the same image.
        index: the images' numbers in the data set.
    """

    crops: list[Tensor]
    index: Tensor
    key_crops: Tensor | None = None
    key_row: Tensor | None = None


def random_batch(case: Case, device: torch.device) -> Batch:
    """Noise, with keys in a random order."""

    def noise(count: int, size: int) -> Tensor:
        return torch.randint(
            0, 256, (case.batch_size, count, size, size, 3), dtype=torch.uint8, device=device
        )

    crops = [noise(count, size) for count, size in zip(case.num_crops, case.crop_size, strict=True)]
    batch = Batch(crops, torch.arange(case.batch_size, device=device))
    if case.method == "moco":
        batch.key_crops, batch.key_row = (
            noise(1, case.crop_size[0]),
            torch.randperm(case.batch_size, device=device),
        )
    return batch


def pixels(crops: Tensor) -> Tensor:
    """uint8 [N, V, S, S, 3] -> float32 [N * V, 3, S, S] in [0, 1]; the memory stays in that order, which is channels-last."""
    return crops.flatten(0, 1).permute(0, 3, 1, 2).float() / 255


class MoCo:
    """Key encoder and queue (Algorithm 1 of the paper)."""

    def __init__(self, case: Case, network: Network, device: torch.device):
        self.case = case
        self.key_network = copy.deepcopy(network).requires_grad_(False)
        self.queue = F.normalize(torch.randn(case.queue_size, case.head_dim, device=device), dim=1)
        self.position = 0
        self.move_average = get_ema_multi_avg_fn(case.key_momentum)

    def targets(self, step: "TorchStep", batch: Batch) -> Tensor:
        """Each image's key [N, D], put back into the rows' order."""
        assert batch.key_crops is not None and batch.key_row is not None
        with torch.no_grad():
            keys = step.forward(self.key_network, [pixels(batch.key_crops)], "clean", False)
        return keys[:, 0][batch.key_row]

    def losses(self, z: Tensor, labels: Sequence[Tensor]) -> list[Tensor]:
        """InfoNCE [N, V] of z [N, V, D] for each of the pseudo-labels [N, D]; the queue is scored once."""
        others = torch.logsumexp(z @ self.queue.T / self.case.temperature, dim=-1)
        own = [(z * y[:, None]).sum(-1) / self.case.temperature for y in labels]
        return [torch.logaddexp(one, others) - one for one in own]

    @torch.no_grad()
    def update(self, network: Network, z: Tensor, y: Tensor) -> None:
        """Move the key encoder and replace the oldest keys."""
        self.move_average(list(self.key_network.parameters()), list(network.parameters()), 0)
        self.queue[self.position : self.position + len(y)] = y
        self.position = (self.position + len(y)) % len(self.queue)


class DeepCluster:
    """Clusters of the epoch before, and the bank of embeddings for the next (Algorithm 2 of the paper)."""

    def __init__(self, case: Case, network: Network, device: torch.device):
        self.case = case
        shape = (case.num_heads, case.num_clusters)
        self.assignments = torch.randint(
            case.num_clusters, (case.num_heads, case.batch_size), device=device
        )
        self.prototypes = F.normalize(torch.randn(*shape, case.head_dim, device=device), dim=-1)
        self.bank = torch.zeros(
            case.bank_steps, case.batch_size, case.assign_crops, case.head_dim, device=device
        )
        self.bank_index = torch.full((case.bank_steps, case.batch_size), -1, device=device)
        self.position = 0
        self.index = torch.arange(case.batch_size, device=device)

    def targets(self, step: "TorchStep", batch: Batch) -> Tensor:
        """Each image's cluster per head, int64 [N, H]."""
        self.index = batch.index
        return self.assignments[:, batch.index].T

    def losses(self, z: Tensor, labels: Sequence[Tensor]) -> list[Tensor]:
        """Cross-entropy [N, V] over cosine scores, the mean over heads, for each of the pseudo-labels [N, H]."""
        num, crops, _ = z.shape
        totals = [torch.zeros(num * crops, device=z.device) for _ in labels]
        for head, prototypes in enumerate(self.prototypes):
            log_probabilities = F.log_softmax(
                z.flatten(0, 1) @ prototypes.T / self.case.temperature, dim=-1
            )
            for i, y in enumerate(labels):
                wanted = y[:, head].repeat_interleave(crops)
                totals[i] = totals[i] + F.nll_loss(log_probabilities, wanted, reduction="none")
        return [total.view(num, crops) / self.case.num_heads for total in totals]

    @torch.no_grad()
    def update(self, network: Network, z: Tensor, y: Tensor) -> None:
        """Write the step's clean embeddings into the bank."""
        self.bank[self.position] = z[:, : self.case.assign_crops]
        self.bank_index[self.position] = self.index
        self.position = (self.position + 1) % len(self.bank)


METHODS = {"moco": MoCo, "deepcluster": DeepCluster}


class TorchStep:
    """A network in training, with its method, optimiser and one batch.

    Args:
        case: what to compute.
        device: "cpu" or "cuda".
        compile_mode: one of COMPILE_MODES.
    """

    def __init__(self, case: Case, device: str = "cpu", compile_mode: str = "off"):
        self.case, self.device = case, torch.device(device)
        torch.manual_seed(0)
        self.network: Any = Network(case)
        self.network.to(self.device, memory_format=torch.channels_last)
        self.method: Any = METHODS[case.method](case, self.network, self.device)
        self.batch = random_batch(case, self.device)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=case.learning_rate,
            momentum=case.momentum,
            weight_decay=case.weight_decay,
            fused=True,
        )
        compiled: dict[str, Any] = {} if compile_mode == "default" else {"mode": compile_mode}
        self.embed: Any = (
            self._embed if compile_mode == "off" else torch.compile(self._embed, **compiled)
        )
        self.score: Any = (
            self._score if compile_mode == "off" else torch.compile(self._score, **compiled)
        )

    def _embed(self, network: Network, crops: Sequence[Tensor], branch: str, write: bool) -> Tensor:
        return network(crops, self.case.batch_size, branch, write)

    def _score(self, z: Tensor, labels: Sequence[Tensor], share: Tensor | None) -> Tensor:
        losses = self.method.losses(z, labels)
        return (losses[0] if share is None else share * losses[0] + (1 - share) * losses[1]).mean()

    def forward(
        self, network: Network, crops: Sequence[Tensor], branch: str, write: bool
    ) -> Tensor:
        """Unit vectors [N, V, D], float32."""
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.case.precision == "bfloat16"
        ):
            return self.embed(network, crops, branch, write)

    def loss(
        self,
        crops: Sequence[Tensor],
        labels: Sequence[Tensor],
        branch: str,
        write: bool = True,
        share: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean loss of a view and its embeddings; with `share` [N, V], the mixture of the losses of two pseudo-labels."""
        z = self.forward(self.network, crops, branch, write)
        return self.score(z, labels, share), z

    def attack(
        self, crops: Sequence[Tensor], y: Tensor, slopes: Sequence[Tensor] | None
    ) -> list[Tensor]:
        """Adversarial views; `slopes` are the gradients at the clean crops where the clean pass has made them."""
        case, points = self.case, list(crops)
        branch = case.attack_norm
        for number in range(case.steps):
            if number or slopes is None:
                slopes = self.slope(points, y, branch)
            with torch.no_grad():
                for i, (x, slope) in enumerate(zip(crops, slopes, strict=True)):
                    change = points[i] + case.step_size * slope.sign() - x
                    points[i] = (x + change.clamp_(-case.epsilon, case.epsilon)).clamp_(0, 1)
        return points

    def slope(self, crops: Sequence[Tensor], y: Tensor, branch: str) -> Sequence[Tensor]:
        """Gradients of the loss with respect to the crops alone; no statistics are written."""
        self.network.requires_grad_(False)  # else torch.compile makes the weights' gradients, too
        points = [x.detach().requires_grad_() for x in crops]
        slopes = torch.autograd.grad(self.loss(points, [y], branch, write=False)[0], points)
        self.network.requires_grad_(True)
        return slopes

    @torch.no_grad()
    def mix(self, crops: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Cut-mixed crops, the share [N, V] of each image itself, and the partners [N]."""
        partner = torch.randperm(self.case.batch_size, device=self.device)
        mixed, shares = [], []
        for x, count in zip(crops, self.case.num_crops, strict=True):
            images = x.permute(0, 2, 3, 1).unflatten(0, (-1, count))  # [N, V, S, S, 3], contiguous
            box = self.boxes(images.shape[:2], images.shape[2])
            pasted, share = paste(images, images[partner], box)
            mixed.append(pasted.flatten(0, 1).permute(0, 3, 1, 2))
            shares.append(share)
        return mixed, torch.cat(shares, dim=1), partner

    def boxes(self, shape: Sequence[int], size: int) -> Tensor:
        """Random boxes, int64 [N, V, 4]: top, bottom, left, right."""
        beta = torch.distributions.Beta(
            torch.tensor(self.case.cutmix_alpha, device=self.device),
            torch.tensor(self.case.cutmix_beta, device=self.device),
        )
        length = (size * torch.sqrt(1 - beta.sample(torch.Size(shape)))).long()
        sides = []
        for _ in range(2):
            first = torch.randint(size, tuple(shape), device=self.device) - length // 2
            sides += [first.clamp(0, size), (first + length).clamp(0, size)]
        return torch.stack(sides, dim=-1)

    def step(self) -> dict[str, Tensor]:
        """One optimiser step; returns the losses of the views, still on the device."""
        case = self.case
        crops = [pixels(x) for x in self.batch.crops]
        y = self.method.targets(self, self.batch)
        shared = case.alpha1 > 0 and case.attack_norm == "clean"
        for x in crops:
            x.requires_grad_(shared)
        self.optimizer.zero_grad(set_to_none=True)
        clean, z = self.loss(crops, [y], "clean")
        clean.backward()
        losses = {"clean": clean.detach()}
        slopes: Any = None
        if shared:
            slopes = [x.grad for x in crops]
            crops = [x.detach() for x in crops]
        if case.alpha1:
            attacked = self.attack(crops, y, slopes)
            loss = self.loss(attacked, [y], "adversarial")[0]
            (case.alpha1 * loss).backward()
            losses["adversarial"] = loss.detach()
        if case.alpha2:
            mixed, share, partner = self.mix(crops)
            loss = self.loss(mixed, [y, y[partner]], "clean", share=share)[0]
            (case.alpha2 * loss).backward()
            losses["cutmix"] = loss.detach()
        self.optimizer.step()
        self.method.update(self.network, z.detach(), y)
        return losses

    def run(self, steps: int) -> float:
        """Seconds of some steps, until the device has finished the last one."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def paste(x: Tensor, partner: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """The partner's pixels in the box of each crop [N, V, S, S, 3], and the share [N, V] that still shows x."""
    place = torch.arange(x.shape[2], device=x.device)
    top, bottom, left, right = (side[..., None] for side in box.unbind(-1))
    # [N, V, S]
    rows, columns = (place >= top) & (place < bottom), (place >= left) & (place < right)
    inside = (rows[..., :, None] & columns[..., None, :])[..., None]
    area = ((bottom - top) * (right - left))[..., 0]
    return torch.where(inside, partner, x), 1 - area / x.shape[2] ** 2


def make(order: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What `serve` needs: a function that runs a turn, and facts about this side."""
    begin = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if order["device"] != device:
        raise Refusal(
            f"hexa_jax runs on {order['device']}, but torch {torch.__version__} on {device}"
        )
    torch.backends.cudnn.benchmark = True
    mode = order["compile"]
    if mode == "auto":
        mode = "default" if device == "cuda" else "off"
    step = TorchStep(Case.from_json(order["case"]), device, mode)
    losses = {name: float(loss) for name, loss in step.step().items()}  # compiles
    step.run(2)
    return step.run, {
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "compile": mode,
        "setup_seconds": time.perf_counter() - begin,
        "step_seconds": step.run(1),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "losses": losses,
    }


if __name__ == "__main__":
    sys.exit(serve(lambda: make(json.loads(sys.argv[1]))))
