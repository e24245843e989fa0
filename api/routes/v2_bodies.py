"""Bodies of the Open Inference Protocol V2 that are no tensors, by the names that the protocol gives them."""

from pydantic import BaseModel, ConfigDict, Field


class Live(BaseModel):
    live: bool = True


class ServerReady(BaseModel):
    ready: bool = True


class ModelReady(BaseModel):
    name: str
    ready: bool = True


class Server(BaseModel):
    name: str = "echosight"
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """shape: -1 stands for the batch."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """versions: those that answer now, the live one first."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class IndexRequest(BaseModel):
    """ready: only what answers now."""

    model_config = ConfigDict(strict=True)

    repository_name: str = ""
    ready: bool = False


class IndexRow(BaseModel):
    name: str
    version: str
    state: str
    reason: str


class RepositoryParameters(BaseModel):
    """version: a number or an alias. config: a model configuration in JSON whose version_policy names versions."""

    version: str | int | None = None
    config: str | None = Field(default=None, max_length=65536)


class RepositoryRequest(BaseModel):
    """What to load or unload; nothing: what the aliases name, or all but the live version."""

    parameters: RepositoryParameters = RepositoryParameters()


class Loaded(BaseModel):
    """versions: those that answer now, the live one first."""

    name: str
    versions: list[str]


class DurationStatistics(BaseModel):
    count: int
    ns: int


class InferenceStatistics(BaseModel):
    success: DurationStatistics
    fail: DurationStatistics
    queue: DurationStatistics
    compute_input: DurationStatistics
    compute_infer: DurationStatistics
    compute_output: DurationStatistics
    cache_hit: DurationStatistics
    cache_miss: DurationStatistics


class BatchStatistics(BaseModel):
    batch_size: int
    compute_input: DurationStatistics
    compute_infer: DurationStatistics
    compute_output: DurationStatistics


class ModelStatistics(BaseModel):
    """last_inference: milliseconds since 1970. inference_count: frames; execution_count: calls of the model."""

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferenceStatistics
    batch_stats: list[BatchStatistics]


class AllStatistics(BaseModel):
    model_stats: list[ModelStatistics]
