"""A worker's numbers over HTTP for Prometheus, each worker's on a port of its own. It knows none of them."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, start_http_server

from services.core.errors import SettingsError


def serve_metrics(registry: CollectorRegistry, *, host: str, port: int, variable: str) -> Callable[[], None]:
    """Answer at http://host:port/metrics until the returned function is called; port 0: nothing to do.

    variable: the setting that the port is from. Raises SettingsError if the port is taken.
    """
    if not port:
        return lambda: None
    try:
        server, thread = start_http_server(port, host, registry=registry)
    except OSError as error:
        raise SettingsError(
            f"{variable} is {port}: {error.strerror} on {host}",
            remedy="choose a free port, or 0 for none",
        ) from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
