"""What `edged schema asyncapi` prints: the topics and payloads, as AsyncAPI 3.0 and as a table.

The topics are those of `edged.topics`, the schemas are made from what requests are parsed with
(`edged.protocol`) and payloads are typed with (`edged.payloads`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from edged import __version__, payloads, protocol
from edged.health import EXPIRY_BEATS
from edged.jobs import Key
from edged.options import Settings, entries
from edged.settings import packet_bytes
from edged.topics import MAX_CORRELATION_BYTES, MAX_TOPIC_BYTES, Topics

_BINDING = {"bindingVersion": "0.2.0"}
_TOPICS = Topics("{base_topic}", "{device}")
#: Channel parameters.
_PARAMETERS: dict[str, dict[str, Any]] = {
    "base_topic": {
        "description": "`mqtt.base_topic`: 1 to 8 levels",
        "default": entries()["mqtt.base_topic"].default,
    },
    "device": {"description": "`device`, by default the host name"},
    "client": {
        "description": "1 to 64 of A-Z a-z 0-9 _ -: a client that the broker's access list can "
        "vouch for"
    },
    "id": {"description": "the job's, 1 to 64 of A-Z a-z 0-9 . _ : -"},
    "camera": {"description": "the camera's name, 1 to 64 of A-Z a-z 0-9 _ -"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Message:
    """A payload, and how it travels."""

    name: str
    #: The type that its schema is made from; None: bytes.
    type: Any
    qos: Literal[0, 1] = 1
    #: MQTT 5 properties that are read or set, and what they mean.
    properties: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Topic:
    """A row of the table. With a client and without are two topics."""

    name: str
    addresses: tuple[str, ...]
    content: str
    messages: tuple[_Message, ...]
    #: Edged sends here; else it listens.
    sent: bool = True
    retained: bool = False
    #: After how many seconds a message expires, as a schema.
    expiry: dict[str, Any] | None = None

    @property
    def qos(self) -> tuple[int, ...]:
        """The QoS of its messages, highest first."""
        return tuple(sorted({message.qos for message in self.messages}, reverse=True))


_CORRELATION = {"correlationData": f"up to {MAX_CORRELATION_BYTES} bytes, echoed in every event"}
_REPLY = {
    "responseTopic": f"up to {MAX_TOPIC_BYTES} bytes, under `mqtt.reply_prefixes`: where the "
    "events go instead of the default response topic; the payload's `reply_to` wins over it",
    **_CORRELATION,
}
_REFUSED = _Message(name="refused", type=payloads.Refused, properties=_CORRELATION)
_EVENTS = (
    _Message(name="accepted", type=payloads.Accepted, properties=_CORRELATION),
    _Message(name="started", type=payloads.Started, properties=_CORRELATION),
    _Message(name="progress", type=payloads.Progress, qos=0, properties=_CORRELATION),
    _Message(name="chunk", type=payloads.Chunk, qos=0, properties=_CORRELATION),
    _Message(name="result", type=payloads.Result, properties=_CORRELATION),
    _Message(name="error", type=payloads.Error, properties=_CORRELATION),
    _REFUSED,
)
_INTERVAL_S = entries()["health.interval_s"].default
_BEATS = {
    "type": "integer",
    "minimum": 1,
    "default": round(EXPIRY_BEATS * _INTERVAL_S),
    "description": f"{EXPIRY_BEATS} times `health.interval_s`",
}


_DEADLINE = {
    "type": "integer",
    "minimum": 0,
    "description": "counts as a `deadline_s`; the smaller wins",
}


def _request(
    kind: str, model: type[protocol.M], content: str, expiry: dict[str, Any] | None = None
) -> _Topic:
    """Return the topics of a kind of request."""
    return _Topic(
        name=f"request{kind.title()}",
        addresses=(_TOPICS.request(kind), _TOPICS.request(kind, "{client}")),
        content=content,
        messages=(_Message(name=f"{kind}Request", type=model, properties=_REPLY),),
        sent=False,
        expiry=expiry,
    )


TOPICS = (
    _Topic(
        name="status",
        addresses=(_TOPICS.status,),
        content="how edged is, and why",
        messages=(_Message(name="status", type=payloads.Status),),
        retained=True,
        expiry={**_BEATS, "description": f"{_BEATS['description']}; none for `offline`"},
    ),
    _Topic(
        name="info",
        addresses=(_TOPICS.info,),
        content="versions, model, memory plan, capabilities, limits, warnings",
        messages=(_Message(name="info", type=payloads.Info),),
        retained=True,
    ),
    _Topic(
        name="health",
        addresses=(_TOPICS.health,),
        content="the heartbeat, every `health.interval_s`",
        messages=(_Message(name="heartbeat", type=payloads.Heartbeat, qos=0),),
        retained=True,
        expiry=_BEATS,
    ),
    _request("text", protocol.TextRequest, "a text job", _DEADLINE),
    _request("vision", protocol.VisionRequest, "a vision job", _DEADLINE),
    _request("cancel", protocol.CancelRequest, "ends a job"),
    _Topic(
        name="response",
        addresses=(
            _TOPICS.response(Key(None, "{id}")),
            _TOPICS.response(Key("{client}", "{id}")),
        ),
        content="a job's events",
        messages=_EVENTS,
    ),
    _Topic(
        name="refused",
        addresses=(_TOPICS.refused,),
        content="refusals that have neither a usable id nor an allowed reply topic",
        messages=(_REFUSED,),
    ),
    _Topic(
        name="cameraFrame",
        addresses=(_TOPICS.camera_frames.replace("+", "{camera}"),),
        content='a frame: raw JPEG or PNG, or `{"image":"<base64>","ts":…}`',
        messages=(
            _Message(
                name="rawFrame",
                type=None,
                qos=0,
                properties={
                    "ts": "a user property: when it was taken, Unix seconds or RFC 3339; absent: "
                    "when it arrives"
                },
            ),
            _Message(name="jsonFrame", type=protocol.InlineFrame, qos=0),
        ),
        sent=False,
    ),
    _Topic(
        name="cameraStatus",
        addresses=(_TOPICS.camera_statuses.replace("+", "{camera}"),),
        content="what has come from this camera, at every beat while frames come",
        messages=(_Message(name="cameraStatus", type=payloads.CameraStatus, qos=0),),
        retained=True,
        expiry=_BEATS,
    ),
)


# The table --------------------------------------------------------------------------------------


def topics_markdown() -> str:
    """Return the topics as a table."""
    lines = [
        "| topic under the root | direction | QoS | retained | content |",
        "|---|---|---|---|---|",
    ]
    for topic in TOPICS:
        names = ", ".join(f"`{_below_root(address)}`" for address in topic.addresses)
        qos = str(topic.qos[0]) if len(topic.qos) == 1 else "see Events"
        retained = {True: "yes", False: "no"}[topic.retained] if topic.sent else "refused"
        direction = "out" if topic.sent else "in"
        lines.append(f"| {names} | {direction} | {qos} | {retained} | {topic.content} |")
    return "\n".join(lines) + "\n"


def _below_root(address: str) -> str:
    return address.removeprefix(f"{_TOPICS.root}/").translate({ord("{"): "<", ord("}"): ">"})


# The document -----------------------------------------------------------------------------------


def document() -> dict[str, Any]:
    """Return the AsyncAPI 3.0 document of edged, with the defaults of the settings."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "edged",
            "version": __version__,
            "description": "An agent that answers text and camera questions over MQTT. This is "
            f"version {protocol.VERSION} of its protocol, seen from the agent: it sends what you "
            "receive. PROTOCOL.md says in words what a schema cannot.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {"broker": _server()},
        "channels": {name: channel for topic in TOPICS for name, channel in _channels(topic)}
        | {
            "reply": {
                "address": None,
                "description": "Where a request wants its events, instead of `response`.",
                "messages": _references(_EVENTS),
            }
        },
        "operations": {name: done for topic in TOPICS for name, done in _operations(topic)},
        "components": {
            "messages": {m.name: _message(m) for topic in TOPICS for m in topic.messages},
            "schemas": _schemas(),
        },
    }


def _server() -> dict[str, Any]:
    mqtt = {name: entries()[f"mqtt.{name}"].default for name in ("keepalive_s", "host")}
    lost = protocol.encode({"v": protocol.VERSION, "state": "offline", "reason": "lost"})
    return {
        "host": "{host}:{port}",
        "description": "Any MQTT broker; edged speaks 3.1.1 too, see `mqtt.protocol`. Frames of "
        "cameras come over a connection of their own, `<client id>-cameras`, without a session.",
        "protocol": "mqtt",
        "protocolVersion": entries()["mqtt.protocol"].default,
        "variables": {
            "host": {"default": mqtt["host"], "description": "`mqtt.host`"},
            "port": {"default": "1883", "description": "`mqtt.port`; with TLS 8883"},
        },
        "bindings": {
            "mqtt": {
                "clientId": "edged-{device}",
                "cleanSession": False,
                "lastWill": {
                    "topic": _TOPICS.status,
                    "qos": 1,
                    "retain": True,
                    "message": f"a `status`, with {lost.decode()}",
                },
                "keepAlive": mqtt["keepalive_s"],
                "sessionExpiryInterval": entries()["mqtt.session_expiry_s"].default,
                "maximumPacketSize": packet_bytes(Settings()),
                **_BINDING,
            }
        },
    }


def _names(topic: _Topic) -> Iterator[tuple[str, str]]:
    """Yield the name and the address of each channel of a topic."""
    for address in topic.addresses:
        yield topic.name + ("OfClient" if "{client}" in address else ""), address


def _references(
    messages: tuple[_Message, ...], channel: str | None = None
) -> dict[str, dict[str, str]]:
    where = "#/components" if channel is None else f"#/channels/{channel}"
    return {m.name: {"$ref": f"{where}/messages/{m.name}"} for m in messages}


def _channels(topic: _Topic) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, address in _names(topic):
        yield (
            name,
            {
                "address": address,
                "description": topic.content,
                "messages": _references(topic.messages),
                "parameters": {
                    parameter: words
                    for parameter, words in _PARAMETERS.items()
                    if f"{{{parameter}}}" in address
                },
            },
        )


def _operations(topic: _Topic) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what is done on a topic: one operation for each QoS, that is part of its binding."""
    for channel, _ in _names(topic):
        for qos in topic.qos:
            messages = tuple(message for message in topic.messages if message.qos == qos)
            verb = "send" if topic.sent else "receive"
            name = verb + channel[0].upper() + channel[1:]
            mqtt: dict[str, Any] = {"qos": qos, "retain": topic.retained, **_BINDING}
            if topic.expiry is not None:
                mqtt["messageExpiryInterval"] = topic.expiry
            operation: dict[str, Any] = {
                "action": verb,
                "channel": {"$ref": f"#/channels/{channel}"},
                "summary": topic.content,
                "messages": list(_references(messages, channel).values()),
                "bindings": {"mqtt": mqtt},
            }
            if any("responseTopic" in message.properties for message in messages):
                operation["reply"] = _reply(channel)
            yield (name if len(topic.qos) == 1 else f"{name}Qos{qos}"), operation


def _reply(channel: str) -> dict[str, Any]:
    # A cancel's only answer is its refusal; the end of the job is told where its events go.
    answers = (_REFUSED,) if channel.startswith("requestCancel") else _EVENTS
    return {
        "address": {
            "location": "$message.header#/responseTopic",
            "description": "Or `reply_to` of the payload, which wins. With neither the events go "
            "to `response`.",
        },
        "channel": {"$ref": "#/channels/reply"},
        "messages": list(_references(answers, "reply").values()),
    }


def _message(message: _Message) -> dict[str, Any]:
    made: dict[str, Any] = {"name": message.name}
    if message.type is None:
        made |= {
            "contentType": "image/jpeg",
            "description": "JPEG; or PNG",
            "payload": {"type": "string", "format": "binary"},
        }
    else:
        made["payload"] = {"$ref": _REFERENCE.format(model=message.type.__name__)}
    if not message.properties:
        return made
    headers = {
        name: {"type": "string", "description": words} for name, words in message.properties.items()
    }
    made["headers"] = {"type": "object", "properties": headers}
    if "correlationData" in headers:
        bound = {name: words for name, words in headers.items() if name in _REPLY}
        made["bindings"] = {"mqtt": {**bound, **_BINDING}}
        made["correlationId"] = {"location": "$message.header#/correlationData"}
    return made


# Schemas ----------------------------------------------------------------------------------------

_REFERENCE = "#/components/schemas/{model}"


def _schemas() -> dict[str, JsonSchemaValue]:
    """Return the JSON Schema (draft 7) of every payload and of what it is made of, by name."""
    types = {m.name: m.type for topic in TOPICS for m in topic.messages if m.type is not None}
    _, made = TypeAdapter.json_schemas(
        [(name, "validation", TypeAdapter(kind)) for name, kind in types.items()],
        ref_template=_REFERENCE,
        schema_generator=_Generator,
    )
    schemas: dict[str, JsonSchemaValue] = made["$defs"]
    return schemas


class _Generator(GenerateJsonSchema):
    """Makes the schemas that AsyncAPI takes; what edged publishes has these fields and no others.

    The dataclasses among the payloads are written whole, whatever their defaults are.
    """

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        """Return that no field has a title: it would be its name."""
        return False

    def field_is_required(self, field: Any, total: bool) -> bool:  # noqa: FBT001 - as in pydantic
        """Return whether the field is always there."""
        return field["type"] == "dataclass-field" or super().field_is_required(field, total)

    def dataclass_field_schema(self, schema: core_schema.DataclassField) -> JsonSchemaValue:
        """Return a field's schema without its default."""
        inner = schema["schema"]
        return self.generate_inner(inner["schema"] if inner["type"] == "default" else inner)

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        """Return a dataclass's schema, closed."""
        return self._closed(super().dataclass_schema(schema))

    def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> JsonSchemaValue:
        """Return a dictionary's schema, closed."""
        return self._closed(super().typed_dict_schema(schema))

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> JsonSchemaValue:
        """Return a union's schema without OpenAPI's `discriminator`, another thing in AsyncAPI."""
        made = super().tagged_union_schema(schema)
        made.pop("discriminator", None)
        return made

    @staticmethod
    def _closed(made: JsonSchemaValue) -> JsonSchemaValue:
        return {**made, "additionalProperties": False}
