"""OpenTelemetry traces, when an operator wants them: a span for each call, and in it one for each stage.

Without tracing nothing of OpenTelemetry is imported and a stage costs as much as before. Sampling, headers and resource
attributes are OpenTelemetry's own environment variables (OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, …).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evergreen.contracts.errors import EvergreenError
from evergreen.serving.metrics import endpoint_of
from evergreen.serving.stages import trace_stages

_current_trace_id: Callable[[], str] = str  # "" until traces are made


def trace_id() -> str:
    """Id of the trace that the call under way belongs to, 32 hex digits; "" without one."""
    return _current_trace_id()


class Tracing:
    """Makes spans and sends them to a collector, until it is closed."""

    def __init__(self, endpoint: str, *, service_name: str, timeout_seconds: float | None = None) -> None:
        """Start the exporter.

        Args:
            endpoint: base URL of a collector that takes OTLP over HTTP, e.g. http://collector:4318.
            service_name: of this server in the traces, unless OTEL_SERVICE_NAME says another.
            timeout_seconds: for one batch of spans, attempts together; default: OpenTelemetry's.

        Raises:
            EvergreenError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise EvergreenError(
                f"traces to {endpoint} need OpenTelemetry ({error}): install evergreen[tracing], or leave out "
                "--otlp-endpoint and OTEL_EXPORTER_OTLP_ENDPOINT"
            ) from error
        resource = Resource.create({"service.name": service_name}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=timeout_seconds)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("evergreen.serving")
        self._propagator = TraceContextTextMapPropagator()
        self._api = trace

        def current() -> str:
            context = trace.get_current_span().get_span_context()
            return trace.format_trace_id(context.trace_id) if context.is_valid else ""

        global _current_trace_id
        _current_trace_id = current
        trace_stages(self._tracer.start_span)

    def close(self) -> None:
        """Make no more spans, and send those that are left."""
        global _current_trace_id
        _current_trace_id = str
        trace_stages(None)
        self._provider.shutdown()

    def call(self, name: str, carrier: dict[str, str], attributes: dict[str, Any]) -> Any:
        """Context manager: the span of a call, in the caller's trace if `carrier` has a traceparent."""
        return self._tracer.start_as_current_span(
            name,
            context=self._propagator.extract(carrier),
            kind=self._api.SpanKind.SERVER,
            attributes=attributes,
            record_exception=False,  # a stack trace belongs in the log, which says the trace's id
        )

    def mark_failed(self, span: Any) -> None:
        """Say that a call failed by our fault."""
        span.set_status(self._api.StatusCode.ERROR)


class TraceRequests:
    """A span for each HTTP request, by OpenTelemetry's conventions for HTTP servers; around an ASGI application."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        protocol, endpoint = endpoint_of(scope["path"]) if scope["type"] == "http" else ("", "health")
        if endpoint in ("health", "metrics"):  # asked every few seconds, and nobody asks what for
            await self._app(scope, receive, send)
            return
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        with self._tracing.call(f"{scope['method']} {protocol} {endpoint}", carrier, attributes) as span:

            async def watched(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        self._tracing.mark_failed(span)
                await send(message)

            await self._app(scope, receive, watched)


class TraceCalls(grpc.aio.ServerInterceptor):
    """A span for each gRPC call but probes."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method.lstrip("/")
        if handler is None or handler.unary_unary is None or method.endswith(("Live", "Ready")):
            return handler
        carrier = {
            key: value for key, value in handler_call_details.invocation_metadata or () if key.startswith("trace")
        }
        answer = handler.unary_unary

        async def traced(request: Any, context: Any) -> Any:
            with self._tracing.call(method, carrier, {"rpc.system": "grpc", "rpc.method": method}):
                return await answer(request, context)

        return grpc.unary_unary_rpc_method_handler(
            traced, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )
