"""How the endpoint is set up. Ray Serve's own defaults are for other work: five requests at once, no time-out, no end
of the queue, half a minute to scale up and ten to scale down."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from prima_ray.base import StrictConfig

MIB = 1 << 20


class LimitsConfig(StrictConfig):
    """What a request may cost, checked before anything of it is decoded."""

    max_body_bytes: int = Field(default=32 * MIB, ge=1024)
    max_image_bytes: int = Field(default=16 * MIB, ge=1024)
    max_pixels: int = Field(default=40_000_000, ge=1)
    """Of one photo, told by its header."""
    max_attributes_bytes: int = Field(default=64 * 1024, ge=16)
    max_json_depth: int = Field(default=8, ge=2)
    max_json_values: int = Field(default=2000, ge=16)
    """Brackets and strings in a body: a parser's work does not grow with its bytes alone."""
    header_timeout_s: float = Field(default=10.0, gt=0)
    body_timeout_s: float = Field(default=30.0, gt=0)
    """For a whole body, however steadily it trickles."""
    max_connections: int = Field(default=512, ge=1)
    max_held_bytes: int = Field(default=512 * MIB, ge=1024)
    """Of all bodies that are being read or answered; the next one is answered with 503."""


class RateConfig(StrictConfig):
    """Per API key, over all replicas; without keys there is one bucket for everybody, and `null` for none."""

    per_minute: float | None = Field(default=None, gt=0)
    burst: int = Field(default=20, ge=1)


class BatchConfig(StrictConfig):
    """Batching across requests: whoever waits when the model is free goes in, up to a size."""

    max_size: int = Field(default=16, ge=1)
    wait_s: float = Field(default=0.0, ge=0)
    """For more to come. 0: a request that is alone is not kept waiting, and under load batches fill by themselves."""
    linger: float = Field(default=0.25, ge=0, le=1)
    """After a batch of several the next one waits at most this share of its time for those who have just been
    answered, who may ask again."""


class ScalingConfig(StrictConfig):
    """Replicas of the model."""

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: float = Field(default=8.0, gt=0)
    """Requests a replica that are waiting or answered, above which one more is asked for."""
    upscale_delay_s: float = Field(default=10.0, ge=0)
    downscale_delay_s: float = Field(default=300.0, ge=0)
    look_back_s: float = Field(default=10.0, gt=0)
    interval_s: float = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class ReplicaConfig(StrictConfig):
    """One replica of the model: one process."""

    device: Literal["cpu", "cuda"] = "cpu"
    num_cpus: float = Field(default=1.0, ge=0)
    """CPUs that Ray counts for it, and threads of torch (at least one)."""
    num_gpus: float = Field(default=0.0, ge=0)
    hang_s: float = Field(default=60.0, gt=0)
    """A batch that takes longer is a hung replica: it is replaced."""
    health_period_s: float = Field(default=10.0, gt=0)
    health_timeout_s: float = Field(default=30.0, gt=0)
    """Of three checks in a row that fail, the replica goes. A machine that is merely busy must not look dead."""
    drain_s: float = Field(default=30.0, gt=0)
    """For answers under way when a replica goes."""


class ServingConfig(StrictConfig):
    """Everything about an endpoint but the run that it serves."""

    limits: LimitsConfig = LimitsConfig()
    rate: RateConfig = RateConfig()
    batch: BatchConfig = BatchConfig()
    scaling: ScalingConfig = ScalingConfig()
    replica: ReplicaConfig = ReplicaConfig()
    request_timeout_s: float = Field(default=30.0, gt=0)
    """From a read body to the answer, waiting and repeats included; then 503."""
    max_queued_requests: int = Field(default=128, ge=1)
    """Requests that wait for a replica; the next one is answered with 503."""
    audit: str | None = None
    """A file to which a line a diagnosis is appended: request id -> key, model and data versions, hashes of photos."""
