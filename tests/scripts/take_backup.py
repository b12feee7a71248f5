#!/usr/bin/env python3
"""Takes a base backup through a coordinator, knowing of pgconvoy only the names of two methods.

Everything else is asked of the coordinator by gRPC reflection (v1). Needs grpc and google.protobuf as Debian packages
them (python3-grpcio, python3-protobuf); the reflection and error-detail messages, which those packages lack, are
described here.

    take_backup.py ADDRESS CLUSTER [--node NODE] [--certificate FILE --key FILE --ca FILE]

Prints one JSON object a line: what a wrong call is told, each state of the operation, and last the operation itself.
Exits 0 when the backup is done, 1 when it failed, 4 when the coordinator refused or could not be reached.
"""

import argparse
import json
import sys

import grpc
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, json_format, message_factory

SERVICE = "pgconvoy.operator.v1.OperatorService"
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
DETAILS = "grpc-status-details-bin"
CALL_SECONDS = 30
BACKUP_SECONDS = 600

FIELD = descriptor_pb2.FieldDescriptorProto
TYPES = {"string": FIELD.TYPE_STRING, "int32": FIELD.TYPE_INT32, "bytes": FIELD.TYPE_BYTES}

# Messages of grpc/reflection/v1/reflection.proto and google/rpc/*.proto, as far as they are used: name, number, type.
REFLECTION_MESSAGES = {
    "ServerReflectionRequest": [("file_containing_symbol", 4, "string")],
    "FileDescriptorResponse": [("file_descriptor_proto", 1, "bytes*")],
    "ErrorResponse": [("error_code", 1, "int32"), ("error_message", 2, "string")],
    "ServerReflectionResponse": [
        ("file_descriptor_response", 4, ".known.FileDescriptorResponse"),
        ("error_response", 7, ".known.ErrorResponse"),
    ],
    "Status": [("code", 1, "int32"), ("message", 2, "string"), ("details", 3, ".google.protobuf.Any*")],
    "MetadataEntry": [("key", 1, "string"), ("value", 2, "string")],
    "ErrorInfo": [("reason", 1, "string"), ("domain", 2, "string"), ("metadata", 3, ".known.MetadataEntry*")],
}


def known_file():
    """Describes REFLECTION_MESSAGES as a proto file."""
    file = descriptor_pb2.FileDescriptorProto(name="known.proto", package="known", syntax="proto3")
    file.dependency.append(any_pb2.DESCRIPTOR.name)
    for name, fields in REFLECTION_MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind in fields:
            field = message.field.add(name=field_name, number=number)
            field.label = FIELD.LABEL_REPEATED if kind.endswith("*") else FIELD.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            field.type = TYPES.get(kind, FIELD.TYPE_MESSAGE)
            if kind not in TYPES:
                field.type_name = kind
    return file


def message_class(descriptor):
    """The class of a message; the function for it has changed its name between versions of protobuf."""
    if hasattr(message_factory, "GetMessageClass"):
        return message_factory.GetMessageClass(descriptor)
    return message_factory.MessageFactory(descriptor.file.pool).GetPrototype(descriptor)


class Coordinator:
    """A coordinator, described by itself."""

    def __init__(self, channel):
        self.channel = channel
        self.pool = descriptor_pool.DescriptorPool()
        self.pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
        self.pool.AddSerializedFile(known_file().SerializeToString())
        self._add_files(self._reflect(SERVICE))

    def known(self, name):
        return message_class(self.pool.FindMessageTypeByName("known." + name))

    def _reflect(self, symbol):
        """The file that declares a symbol, with all that it imports."""
        request_class, response_class = self.known("ServerReflectionRequest"), self.known("ServerReflectionResponse")
        call = self.channel.stream_stream(
            REFLECTION,
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=response_class.FromString,
        )
        answer = next(call(iter([request_class(file_containing_symbol=symbol)]), timeout=CALL_SECONDS))
        if answer.HasField("error_response"):
            raise LookupError(f"{symbol}: {answer.error_response.error_message}")
        return [
            descriptor_pb2.FileDescriptorProto.FromString(file)
            for file in answer.file_descriptor_response.file_descriptor_proto
        ]

    def _add_files(self, files):
        """Adds files to the pool, imported ones first."""
        waiting = {file.name: file for file in files}

        def add(name):
            file = waiting.pop(name, None)
            if file is not None:
                for imported in file.dependency:
                    add(imported)
                self.pool.AddSerializedFile(file.SerializeToString())

        for name in list(waiting):
            add(name)

    def method(self, name):
        return self.pool.FindServiceByName(SERVICE).methods_by_name[name]

    def call(self, name, fields, seconds=CALL_SECONDS):
        """Calls a method; a streaming one gives an iterator of answers."""
        method = self.method(name)
        request = json_format.ParseDict(fields, message_class(method.input_type)())
        # Older versions of protobuf do not say in Python which methods stream.
        proto = descriptor_pb2.ServiceDescriptorProto()
        method.containing_service.CopyToProto(proto)
        streams = next(one for one in proto.method if one.name == name).server_streaming
        kind = self.channel.unary_stream if streams else self.channel.unary_unary
        stub = kind(
            f"/{SERVICE}/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_class(method.output_type).FromString,
        )
        return stub(request, timeout=seconds)

    def error_info(self, error):
        """Code, message and ErrorInfo of a failed call."""
        told = {"code": error.code().name, "message": error.details()}
        for key, value in error.trailing_metadata() or ():
            if key != DETAILS:
                continue
            for detail in self.known("Status").FromString(value).details:
                if detail.type_url.endswith("/google.rpc.ErrorInfo"):
                    info = self.known("ErrorInfo").FromString(detail.value)
                    metadata = {entry.key: entry.value for entry in info.metadata}
                    told.update(reason=info.reason, domain=info.domain, metadata=metadata)
        return told


def say(**fields):
    print(json.dumps(fields, sort_keys=True), flush=True)


def shown(operation):
    return json_format.MessageToDict(operation, preserving_proto_field_name=True)


def open_channel(arguments):
    options = [("grpc.enable_http_proxy", 0)]
    if not arguments.ca:
        return grpc.insecure_channel(arguments.address, options=options)
    read = lambda path: open(path, "rb").read()  # noqa: E731
    credentials = grpc.ssl_channel_credentials(read(arguments.ca), read(arguments.key), read(arguments.certificate))
    return grpc.secure_channel(arguments.address, credentials, options=options)


def wrong_calls(coordinator):
    """Makes two calls that cannot succeed, one of them a stream, and says what each is told."""
    for name, fields in (
        ("StartBackup", {"cluster": "no-such-cluster"}),
        ("WatchOperation", {"operation": "no-such-operation"}),
    ):
        try:
            answer = coordinator.call(name, fields)
            list(answer) if coordinator.method(name).name.startswith("Watch") else answer
            say(wrong=name, told=None)
        except grpc.RpcError as error:
            say(wrong=name, told=coordinator.error_info(error))


def take_backup(coordinator, arguments):
    request = {"cluster": arguments.cluster, "start_fast": True, "label": "taken by a script"}
    if arguments.node:
        request["node"] = arguments.node
    operation = coordinator.call("StartBackup", request).operation
    say(started=shown(operation))
    for answer in coordinator.call("WatchOperation", {"operation": operation.operation}, BACKUP_SECONDS):
        operation = answer.operation
        say(watched=shown(operation))
    state = shown(operation).get("state")
    say(ended=shown(operation))
    return 0 if state == "OPERATION_STATE_DONE" else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="host:port")
    parser.add_argument("cluster")
    parser.add_argument("--node", default="")
    for name in ("certificate", "key", "ca"):
        parser.add_argument("--" + name)
    arguments = parser.parse_args()
    with open_channel(arguments) as channel:
        coordinator = None
        try:
            coordinator = Coordinator(channel)
            wrong_calls(coordinator)
            return take_backup(coordinator, arguments)
        except grpc.RpcError as error:
            say(refused=coordinator.error_info(error) if coordinator else {"code": error.code().name})
            return 4


if __name__ == "__main__":
    sys.exit(main())
