"""DeepSpeed's ZeRO, stages 0 to 3: the optimizer, gradients and weights in shards."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from compt.dist import collectives as dist
from compt.engines.average import Average
from compt.engines.base import COMPUTE_DTYPES, AdamWSettings, EngineArguments, EngineHead, Finish, adamw, in_groups
from compt.engines.scale import LossScale
from compt.engines.state_dcp import OTHER
from compt.engines.zero.parts import Parts
from compt.engines.zero.start import check_zero, destroy, fill_partitioned, forget_module, start_deepspeed
from compt.engines.zero.state import open_zero, save_zero, take_moments
from compt.models.clip import fill, models_in, shardable_blocks
from compt.models.states import check_shapes
from compt.weights.lazy import Weights


class ZeroEngine(EngineHead):
    """Trains a module under DeepSpeed (`Engine` says what each method does).

    `config` is DeepSpeed's JSON for this stage, as `compt.recipe.deepspeed` makes it. It says how the state is cut up
    and sent around; what is computed follows from the other arguments, and DeepSpeed's own keys for that are taken out.
    As in the other engines, parameters are fp32 and computed with under autocast. The caller accumulates gradients;
    this class clips them and scales the loss in fp16. At stage 3 no rank ever holds a whole module from the "meta"
    device.
    """

    format: Literal["dcp", "deepspeed"] = "deepspeed"

    def __init__(
        self,
        module: nn.Module,
        settings: AdamWSettings | None = None,
        *,
        stage: int,
        config: Mapping[str, Any] | None = None,
        **given: Unpack[EngineArguments],
    ) -> None:
        super().__init__(module, given)
        initial, decay = given.get("initial"), given.get("ema_decay")
        self.stage = stage
        self._deepspeed = start_deepspeed(self.device)
        json = _complete(config or {}, stage, self.world_size)
        check_zero(json)
        # Before parameters are cut up and lose their shapes.
        groups = in_groups({name: one for name, one in module.named_parameters() if one.requires_grad})
        if initial is not None and stage == 3:
            fill_partitioned(self._deepspeed, module, initial, self.device, json)
        elif initial is not None:
            fill(module, initial, self.device)
        # Dynamo cannot trace a part of a block that is still cut up, as it has no shape.
        self._change_blocks(given, hooked=stage != 3)
        self._trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.optimizer = adamw(self._trained, settings or AdamWSettings(), groups)
        self._order = [name for names in groups.values() for name in names]
        self._engine, self._zero, *_ = self._deepspeed.initialize(model=module, optimizer=self.optimizer, config=json)
        forget_module(module)
        dist.share_timeout()
        if given.get("compile", "off") != "off" and stage == 3:
            self._gather_blocks_whole()
        # DeepSpeed's hooks on gradients hold the engine where the garbage collector does not look. Without `destroy`
        # its memory would be missing for the next link.
        weakref.finalize(self, destroy, self._engine).atexit = False
        # This is DeepSpeed's `torch_autocast`, set here because the key of its JSON does more: it sums gradients in
        # half precision, lets each rank update a loss scaler alone, and stays on for the next engine of the process.
        self._engine._config.torch_autocast_enabled = self.precision != "fp32"
        self._engine._config.torch_autocast_dtype = COMPUTE_DTYPES[self.precision]
        self._parts = Parts(stage, self._zero, self._trained)
        # On the CPU with ZeRO: DeepSpeed takes the scale as a number, and knows on the CPU whether it skipped a step.
        self._scale = LossScale(torch.device("cpu") if stage else self.device) if self.precision == "fp16" else None
        self._caps = dict(given.get("caps") or {})
        # A hook, as the caps have to come before DeepSpeed copies what was stepped to the module.
        own = weakref.proxy(self)
        self.optimizer.register_step_post_hook(lambda *_: own._cap())
        vectors = {str(number): self._parts.weight(number) for number in range(len(self._parts.masters))}
        self._average = None if decay is None else Average(vectors, decay)

    def _average_vector(self, number: int) -> Tensor:
        assert self._average is not None
        return self._average.tensors[str(number)]

    @torch.no_grad()
    def _cap(self) -> None:
        stepped = {id(vector) for group in self.optimizer.param_groups for vector in group["params"]}
        skipped = getattr(self.optimizer, "found_inf", torch.zeros(())) > 0
        for name, most in self._caps.items():
            # DeepSpeed calls the optimizer once for each vector.
            if id(self._parts.masters[self._parts.where[name].vector]) in stepped:
                held = self._parts.held(name, self._parts.weight)
                held.copy_(torch.where(skipped.to(held.device), held, held.clamp(max=most)))

    def forward(self, *inputs: Any, last: bool = True) -> dict[str, Tensor]:
        """Outputs of the module, in mixed precision."""
        self._engine.set_gradient_accumulation_boundary(last)
        outputs: dict[str, Tensor] = self._engine(*inputs)
        return outputs

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Backward of `loss`, scaled in fp16. Stages 2 and 3 average gradients in each, the others in the `last`."""
        self._engine.set_gradient_accumulation_boundary(last)
        if self._scale and self.stage:
            self._zero.override_loss_scale(float(self._scale.scale))
        elif self._scale:
            loss = loss * self._scale.scale
        self._engine.backward(loss, scale_wrt_gas=False)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Name and gradient of each trained parameter; zeros where there is none."""
        latest: tuple[int, Tensor] | None = None
        for name, part in self._parts.where.items():
            if latest is None or latest[0] != part.vector:
                latest = (part.vector, self._parts.gradient(part.vector))
            whole = self._parts.whole(name, part.of(latest[1]), self.device)
            yield name, whole / float(self._scale.scale) if self._scale else whole

    def step(self, lr: float, max_norm: float | None = None) -> Tensor:
        """Clip, AdamW, caps, average. Stages 1 to 3 wait for the norm: DeepSpeed checks it on the CPU."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self._step_shards(max_norm) if self.stage else self._step_whole(max_norm)
        finite = norm.isfinite()
        if self._scale:
            self._scale.update(torch.tensor(float(self._zero.overflow)) if self.stage else (~finite).float())
        if self._average:
            self._average.update(finite)
        return norm

    def _step_shards(self, max_norm: float | None) -> Tensor:
        self._zero.clip_grad = max_norm or 0.0
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        return torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float32, device=self.device)

    def _step_whole(self, max_norm: float | None) -> Tensor:
        gradients = [parameter.grad for parameter in self._trained.values() if parameter.grad is not None]
        if self._scale:
            torch._foreach_div_(gradients, self._scale.scale)
        norm = torch.nn.utils.get_total_norm(gradients, foreach=self.device.type == "cuda" or None)
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._trained.values(), max_norm, norm)
        # The fused kernel's own switch, made for GradScaler: a nonzero value turns the step into nothing.
        self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        del self.optimizer.found_inf  # type: ignore[attr-defined]
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def weights(self, average: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Name and fp32 value of each parameter and buffer."""
        vectors = self._average_vector if average and self._average else self._parts.weight
        for name, tensor in self.unwrapped.state_dict(keep_vars=True).items():
            if name in self._trained:
                yield name, self._parts.whole(name, self._parts.held(name, vectors), self.device)
            else:
                with self._deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                    whole = tensor.detach().to("cpu", copy=True)
                yield name, whole

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Evaluation mode. At stage 3 every rank holds the whole module inside."""
        with super().scoring(), self._gathered():
            yield

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        if self.stage != 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(self.unwrapped.parameters())):
            # The hooks would gather and give up weights block by block, and ranks that score alone would hang.
            home = self._zero.parameter_offload
            # The hook at the start of the module's forward would compare the ranks' order of blocks.
            start = home.module._forward_pre_hooks[home.fwd_pre_hook.id]
            home.fwd_pre_hook.remove()
            self._unhook()
            try:
                yield
            finally:
                home.fwd_pre_hook = home.module.register_forward_pre_hook(start)
                self._hook()

    def _unhook(self) -> None:
        home = self._zero.parameter_offload
        for hook in (*home.forward_hooks, *home.backward_hooks):
            hook.remove()
        home.forward_hooks, home.backward_hooks = [], []

    def _hook(self) -> None:
        home = self._zero.parameter_offload
        home._register_deepspeed_module(home.module)

    def _gather_blocks_whole(self) -> None:
        """Gather a block as a whole before its forward, instead of part by part while it runs."""
        self._unhook()
        # Not before `initialize`: DeepSpeed would then sum the gradients of such a leaf at each call of the block, and
        # one forward calls a block once for captions of each length.
        for model in models_in(self.unwrapped):
            for block in shardable_blocks(model):
                self._deepspeed.utils.set_z3_leaf_module(block, True)
        self._hook()

    def save(self, folder: Path, *, asynchronous: bool = False) -> Finish:
        """Write DeepSpeed's files and the average. DeepSpeed cannot write in the background."""
        note: dict[str, Any] = {"stage": self.stage, "names": self._order}
        if self._scale:
            note |= {name: tensor.item() for name, tensor in self._scale.state().items()}
        files = save_zero(self._engine, self._parts, self._average, note, folder)
        return lambda: files

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Load what any number of ranks, and any stage, saved."""
        own = self._shapes()
        state, average = dist.on_all(lambda: open_zero(Path(folder), self._parts, own, self._average is not None))
        self._take(state.weights)
        if self._average and average:
            for name in self._trained:
                self._parts.take(name, average[name], self._average_vector)
            self._average.updates.fill_(average.updates)
        take_moments(self._parts, self.optimizer, state)
        if self._scale:
            own_scale = self._scale.state()
            self._scale.load({name: torch.as_tensor(state.noted.get(name, own_scale[name])) for name in own_scale})

    @torch.no_grad()
    def set_weights(self, weights: Weights) -> None:
        """Take other values for the module's state; moments and average stay. All ranks call it.

        Raises ArtefactError, on all ranks and before anything is changed, when a name or a shape does not fit.
        """
        own = self._shapes()
        dist.on_all(lambda: check_shapes(own, weights, OTHER))
        self._take(weights)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        state = self.unwrapped.state_dict(keep_vars=True)
        return {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in state.items()}

    def _take(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in self.unwrapped.state_dict(keep_vars=True).items():
            if name in self._trained:
                self._parts.take(name, weights[name], self._parts.weight)
            else:
                gathered = hasattr(tensor, "ds_id")
                with self._deepspeed.zero.GatheredParameters([tensor], modifier_rank=0, enabled=gathered):
                    tensor.copy_(weights[name])
        self._parts.publish()


def _complete(config: Mapping[str, Any], stage: int, world_size: int) -> dict[str, Any]:
    """The JSON for DeepSpeed: `config` with the keys that it must have, and without what this class does itself."""
    json = copy.deepcopy(dict(config))
    zero = json.setdefault("zero_optimization", {})
    zero["stage"] = stage
    # It would replace torch's linear function in the whole process.
    zero["memory_efficient_linear"] = False
    # DeepSpeed does not count samples or pieces here: the caller says which backward is the last.
    json |= {"train_batch_size": world_size, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    json["zero_force_ds_cpu_optimizer"] = False
    json["gradient_clipping"] = 0.0
    for key in ("optimizer", "scheduler", "bf16", "fp16", "torch_autocast"):
        json.pop(key, None)
    return json
