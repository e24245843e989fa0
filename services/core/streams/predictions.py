"""Predictions into their sites' streams, by the one process that holds a site's lease, each stream capped.

It does not know who predicts, nor how.
"""

from collections.abc import Mapping, Sequence

from redis.exceptions import ResponseError

from services.core.errors import BadFrameError
from services.core.predictions import Prediction, decode_prediction, encode_prediction
from services.core.streams.client import (
    PREDICTIONS_MAX_ENTRIES,
    Client,
    explained,
    passing_as_lost,
    send_all,
    stream_key,
)
from services.core.streams.leases import SiteLeases
from services.core.streams.scripts import Call, Script, call

_PUBLISH = Script("""
if redis.pcall('GET', KEYS[2]) ~= ARGV[1] then return 0 end
local kind = redis.call('TYPE', KEYS[1]).ok
if kind ~= 'stream' and kind ~= 'none' then return 0 end
for i = 3, #ARGV do redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*', 'header', ARGV[i]) end
return 1
""")
"""KEYS: predictions, lease. ARGV: what the lease holds while it is ours, cap, headers."""


class PredictionLog:
    """Writes the predictions of the sites whose leases are ours."""

    def __init__(self, client: Client, leases: SiteLeases) -> None:
        self._client = client
        self._leases = leases

    @passing_as_lost()
    async def publish(
        self, predictions: Mapping[str, Sequence[Prediction]], tokens: Mapping[str, int]
    ) -> set[str]:
        """Append to the sites' streams, in one round trip to each server; the sites where that is not to be.

        Of each site all or none: nothing where the lease is not ours any more (a process that was paused while
        another took over publishes nothing), nor where the key holds something else.
        tokens: of the sites' leases. Raises StreamsLost errors.
        """
        calls = []
        for site, its in predictions.items():
            keys = (stream_key(site, "predictions"), self._leases.key(site))
            head = (self._leases.value(tokens[site]), PREDICTIONS_MAX_ENTRIES)
            calls.append(Call(_PUBLISH, keys, (*head, *map(encode_prediction, its))))
        were_taken = await call(self._client, calls)
        return {site for site, is_taken in zip(predictions, were_taken, strict=True) if not is_taken}

    @passing_as_lost()
    async def last_frame(self, site: str) -> str:
        """The radar stream's id of the frame that was predicted last; "" if none is known.

        Raises StreamsLost errors, and StreamsError where the key is no stream.
        """
        key = stream_key(site, "predictions")
        [entries] = await send_all(self._client, [(key, ("XREVRANGE", key, "+", "-", "COUNT", 1))])
        if isinstance(entries, ResponseError):
            raise await explained(self._client, entries, {key: "stream"})
        try:
            return decode_prediction(entries[0][1]).radar_id if entries else ""
        except BadFrameError:  # somebody else wrote it
            return ""
