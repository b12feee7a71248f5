#!/usr/bin/env python3
"""Reads a pgconvoy repository that lies in a directory, without any program of pgconvoy.

    pgconvoy_read.py DIRECTORY list
    pgconvoy_read.py DIRECTORY verify
    pgconvoy_read.py DIRECTORY wal CLUSTER SYSTEM FILE TARGET
    pgconvoy_read.py DIRECTORY backup CLUSTER BACKUP TARGET

Written from crates/repository/FORMAT.md alone. It needs Python 3.9 and a Zstandard module: `compression.zstd` (3.14),
`backports.zstd` or `zstandard`. Every digest is checked before bytes are used. It is meant to be read, and to be slow.
"""

import hashlib
import json
import os
import struct
import sys

WAL_MAGIC, PACK_MAGIC, PACK_END, MANIFEST_MAGIC = b"PGCVWAL1", b"PGCVPAK1", b"PGCVPEND", b"PGCVMAN1"


class Damaged(Exception):
    """What the repository holds is not what this format allows."""


def need(condition, message):
    if not condition:
        raise Damaged(message)


# --- Zstandard and CRC-32C ------------------------------------------------------------------------------------------


def decompress(frames):
    """The content of any number of Zstandard frames."""
    if not frames:
        return b""
    try:
        try:
            from compression import zstd
        except ImportError:
            from backports import zstd
        return zstd.decompress(frames)
    except ImportError:
        import io

        import zstandard

        reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(frames), read_across_frames=True)
        return reader.read()


def crc32c_table():
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


CRC32C_TABLE = crc32c_table()


def crc32c(data):
    crc, table = 0xFFFFFFFF, CRC32C_TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


# --- Objects --------------------------------------------------------------------------------------------------------


def read(root, key):
    with open(os.path.join(root, key), "rb") as file:
        return file.read()


def keys(root, prefix):
    """All keys below a prefix that ends with a slash, in order."""
    found = []
    for directory, _, files in os.walk(os.path.join(root, prefix)):
        found += [os.path.relpath(os.path.join(directory, file), root) for file in files]
    return sorted(found)


def check_versions(about, what, understood=()):
    need(about.get("format") == 1, f"{what}: format {about.get('format')} is not understood")
    unknown = [name for name in about.get("critical", []) if name not in understood]
    need(not unknown, f"{what}: {unknown} are not understood")


def read_bytes(value):
    """Bytes that stand in JSON as text, or as hex if they are not UTF-8."""
    return value.encode() if isinstance(value, str) else bytes.fromhex(value["hex"])


# --- WAL ------------------------------------------------------------------------------------------------------------


def read_wal_object(data, key):
    """Header and content of a WAL object that must be what its key says."""
    need(data[:8] == WAL_MAGIC, f"{key}: no WAL object")
    (length,) = struct.unpack_from("<I", data, 8)
    end = 12 + length
    need(end + 4 <= min(len(data), 16384), f"{key}: cut in the header")
    need(struct.unpack_from("<I", data, end)[0] == crc32c(data[:end]), f"{key}: header checksum")
    header = json.loads(data[12:end])
    check_versions(header, key)
    frames = data[end + 4 :]
    need(header["encoding"] == "zstd", f"{key}: encoding {header['encoding']}")
    need(len(frames) == header["frames_size"], f"{key}: {len(frames)} bytes of frames")
    need(hashlib.sha256(frames).hexdigest() == header["frames_sha256"], f"{key}: digest of the frames")
    content = decompress(frames)
    need(len(content) == header["size"], f"{key}: {len(content)} bytes of content")
    need(hashlib.sha256(content).hexdigest() == header["sha256"], f"{key}: digest of the content")
    _, cluster, system, directory, *rest = key.split("/")
    need(header["cluster"] == cluster and header["system_identifier"] == system, f"{key}: of another cluster")
    name = rest[-1]
    if directory != "history":
        name, fingerprint = name.rsplit(".", 1)
        need(fingerprint == "s" + header["sha256"][:32], f"{key}: fingerprint")
    need(header["name"] == name, f"{key}: holds {header['name']}")
    return header, content


def wal_content(root, cluster, system, name):
    """The content to serve for a WAL file name."""
    base = f"c/{cluster}/{system}"
    if name.endswith(".history"):
        key = f"{base}/history/{name}"
        return read_wal_object(read(root, key), key)[1]
    directory = f"{base}/wal/{name[:8]}/{name[8:16]}/"
    found = [key for key in keys(root, directory) if key[len(directory) :].rsplit(".", 1)[0] == name]
    need(found, f"{name} is not archived")
    if len(found) > 1:
        decisions = keys(root, f"{base}/decision/{name}/")
        if decisions:
            decision = json.loads(read(root, decisions[-1]))
            check_versions(decision, decisions[-1])
            found = [key for key in found if key.endswith("." + decision["fingerprint"])]
            need(found, f"{name}: the chosen content is not here")
            return read_wal_object(read(root, found[0]), found[0])[1]
    return canonical(name, [read_wal_object(read(root, key), key) for key in found])


def wal_bytes(header):
    """How many bytes of a segment are WAL; None if the header does not say."""
    if header["logical_end"] is None:
        return None
    high, low = (int(half, 16) for half in header["logical_end"].split("/"))
    log, segment = int(header["name"][8:16], 16), int(header["name"][16:24], 16)
    count = ((high << 32) + low) - ((log << 32) + segment * header["size"])
    return count if 0 <= count <= header["size"] else None


def canonical(name, contents):
    """The content that includes all others."""
    contents.sort(key=lambda content: (not content[0]["complete"], -(wal_bytes(content[0]) or 0)))
    (header, content), others = contents[0], contents[1:]
    if name.endswith(".partial"):
        return content
    for other_header, other in others:
        count = wal_bytes(other_header)
        agrees = count is not None and (wal_bytes(header) or 0) >= count and content[:count] == other[:count]
        need(agrees and not other_header["complete"], f"{name}: contents in conflict")
    need(header["complete"], f"{name}: only incomplete")
    return content


# --- Root commits ---------------------------------------------------------------------------------------------------


# What a root may have besides backups. None of it concerns a reader.
ROOT_PARTS = ("pins", "holds", "condemned", "gone", "wal_kept")


def newest_root(root, cluster):
    """The newest root commit, after the whole history was checked."""
    newest, previous = None, None
    for number, key in enumerate(keys(root, f"c/{cluster}/root/"), start=1):
        need(key == f"c/{cluster}/root/{number:016x}", f"{key}: generation {number} is missing")
        data = read(root, key)
        need(data.startswith(b'{"root":') and data.endswith(b'"}\n'), f"{key}: no root")
        text, digest = data[len(b'{"root":') : -len(b',"sha256":"') - 67], data[-67:-3].decode()
        need(hashlib.sha256(text).hexdigest() == digest, f"{key}: digest")
        newest = json.loads(text)
        check_versions(newest, key, ROOT_PARTS)
        sorted_text = json.dumps(newest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        need(sorted_text == text, f"{key}: not canonical")
        need(newest["previous_sha256"] == previous, f"{key}: does not follow the one before")
        need(newest["generation"] == number and newest["cluster"] == cluster, f"{key}: says something else")
        previous = digest
    return newest


# --- Backups --------------------------------------------------------------------------------------------------------


def read_frames(data, key):
    """Yields (file, offset, content) of each frame in a range of a pack."""
    position = 0
    while position < len(data):
        need(position + 40 <= len(data), f"{key}: cut in a frame")
        stored, raw, file, encoding, pages, zero, offset = struct.unpack_from("<IIIBBHQ", data, position)
        body = data[position + 40 : position + 40 + stored]
        need(len(body) == stored and 0 < raw <= 65536 and stored <= raw, f"{key}: frame lengths at {position}")
        digest = hashlib.sha256(data[position : position + 24] + body).digest()[:16]
        need(digest == data[position + 24 : position + 40], f"{key}: frame digest at {position}")
        need(pages == 0 and zero == 0 and encoding in (0, 1), f"{key}: unknown frame at {position}")
        content = decompress(body) if encoding else body
        need(len(content) == raw, f"{key}: frame content at {position}")
        yield file, offset, content
        position += 40 + stored


def check_pack(data, key):
    """Checks a whole pack: trailer, table, every frame."""
    need(data[:8] == PACK_MAGIC and data[-8:] == PACK_END, f"{key}: no pack")
    trailer = data[-56:]
    table_at, count, zero = struct.unpack_from("<QII", trailer)
    table = data[table_at:-56]
    need(zero == 0 and len(table) == 32 * count, f"{key}: trailer")
    need(hashlib.sha256(table + trailer[:16]).digest() == trailer[16:48], f"{key}: digest of the table")
    position = 8
    for number, (file, offset, content) in enumerate(read_frames(data[8:table_at], key)):
        entry = struct.unpack_from("<IIQQII", table, 32 * number)
        (stored,) = struct.unpack_from("<I", data, position)
        need(entry == (file, len(content), offset, position, stored, 0), f"{key}: table entry {number}")
        position += 40 + stored
    need(position == table_at, f"{key}: frames and table differ")


def read_manifest(root, cluster, entry):
    """The lines of a manifest that a root names."""
    key = f"c/{cluster}/b/{entry['backup']}/manifest"
    data = read(root, key)
    need(len(data) == entry["manifest_size"], f"{key}: size")
    need(hashlib.sha256(data).hexdigest() == entry["manifest_sha256"], f"{key}: digest")
    need(data[:8] == MANIFEST_MAGIC, f"{key}: no manifest")
    lines = [json.loads(line) for line in decompress(data[8:]).splitlines()]
    order = ["head", "tablespace", "directory", "link", "pack", "file", "end"]
    ranks = [order.index(line["line"]) for line in lines]
    need(ranks == sorted(ranks) and ranks[0] == 0 and ranks[-1] == 6, f"{key}: order of lines")
    check_versions(lines[0], key)
    of = lambda kind: [line for line in lines if line["line"] == kind]
    end = lines[-1]
    counts = {"tablespaces": "tablespace", "directories": "directory", "links": "link", "packs": "pack", "files": "file"}
    for name, kind in counts.items():
        need(end[name] == len(of(kind)), f"{key}: count of {name}")
    need(end["data_bytes"] == sum(file["size"] for file in of("file")), f"{key}: bytes of files")
    need(end["pack_bytes"] == sum(pack["size"] for pack in of("pack")), f"{key}: bytes of packs")
    return lines


def file_content(root, cluster, backup, line):
    """The content of one file of a backup."""
    need(len(line["layers"]) <= 1, f"{line['path']}: several layers")
    content = b""
    for layer in line["layers"]:
        need("backup" not in layer, f"{line['path']}: a layer of another backup")
        for extent in layer["extents"]:
            need(extent["from"] == len(content), f"{line['path']}: no content from {len(content)}")
            key = f"c/{cluster}/b/{backup}/p/{extent['pack']:06}"
            with open(os.path.join(root, key), "rb") as pack:
                pack.seek(extent["offset"])
                data = pack.read(extent["length"])
            need(len(data) == extent["length"], f"{key}: cut")
            for file, offset, piece in read_frames(data, key):
                need((file, offset) == (line["number"], len(content)), f"{key}: holds another file's frame")
                content += piece
            need(extent["to"] == len(content), f"{line['path']}: extent ends early")
    need(len(content) == line["size"], f"{line['path']}: {len(content)} bytes")
    need(crc32c(content) == line["crc32c"], f"{line['path']}: checksum")
    return content


def find_backup(root, cluster, backup):
    newest = newest_root(root, cluster)
    entries = [entry for entry in (newest or {}).get("backups", []) if entry["backup"] == backup]
    need(entries, f"no root of {cluster} names backup {backup}")
    return entries[0]


def restore_path(target, path):
    """A path of a manifest below the target directory."""
    parts = path.split(b"/")
    need(all(part not in (b"", b".", b"..") for part in parts) and b"\0" not in path, f"path {path!r}")
    return os.path.join(os.fsencode(target), path)


def extract_backup(root, cluster, backup, target):
    """Lays a backup out below a directory that does not exist yet. Tablespaces become directories in pg_tblspc."""
    entry = find_backup(root, cluster, backup)
    lines = read_manifest(root, cluster, entry)
    os.mkdir(target)
    head = lines[0]
    for line in lines:
        if line["line"] == "tablespace":
            os.makedirs(os.path.join(target, "pg_tblspc", str(line["oid"])), exist_ok=True)
        elif line["line"] == "directory":
            os.makedirs(restore_path(target, read_bytes(line["path"])), exist_ok=True)
        elif line["line"] == "link":
            os.symlink(read_bytes(line["target"]), restore_path(target, read_bytes(line["path"])))
        elif line["line"] == "file":
            path = restore_path(target, read_bytes(line["path"]))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "xb") as file:
                file.write(file_content(root, cluster, backup, line))
            os.chmod(path, line["mode"] & 0o7777)
    for name in ("backup_label", "tablespace_map"):
        content = read_bytes(head[name])
        if content:
            with open(os.path.join(target, name), "xb") as file:
                file.write(content)
    os.chmod(target, head["mode"] & 0o7777)


def verify_backup(root, cluster, entry):
    lines = read_manifest(root, cluster, entry)
    for pack in (line for line in lines if line["line"] == "pack"):
        key = f"c/{cluster}/b/{entry['backup']}/p/{pack['number']:06}"
        data = read(root, key)
        need(len(data) == pack["size"], f"{key}: size")
        need(hashlib.sha256(data).hexdigest() == pack["sha256"], f"{key}: digest")
        check_pack(data, key)
    for line in lines:
        if line["line"] == "file":
            file_content(root, cluster, entry["backup"], line)
    return len(lines)


# --- Commands -------------------------------------------------------------------------------------------------------


def clusters(root):
    identity = json.loads(read(root, "repo.json"))
    check_versions(identity, "repo.json")
    base = os.path.join(root, "c")
    return sorted(os.listdir(base)) if os.path.isdir(base) else []


def systems(root, cluster):
    return sorted(name for name in os.listdir(os.path.join(root, "c", cluster)) if name.isdigit())


def wal_keys(root, cluster, system):
    base = f"c/{cluster}/{system}"
    return keys(root, f"{base}/wal/") + keys(root, f"{base}/history/") + keys(root, f"{base}/conflict/")


def list_all(root):
    for cluster in clusters(root):
        for entry in (newest_root(root, cluster) or {}).get("backups", []):
            print(f"{cluster} backup {entry['backup']} {entry['start_lsn']} {entry['stop_lsn']}")
        for system in systems(root, cluster):
            for key in wal_keys(root, cluster, system):
                print(f"{cluster} wal {system} {key.rsplit('/', 1)[1]}")


def verify_all(root):
    objects, backups = 0, 0
    for cluster in clusters(root):
        for entry in (newest_root(root, cluster) or {}).get("backups", []):
            verify_backup(root, cluster, entry)
            backups += 1
        for system in systems(root, cluster):
            for key in wal_keys(root, cluster, system):
                read_wal_object(read(root, key), key)
                objects += 1
    print(f"verified {objects} WAL objects and {backups} backups")


def main(arguments):
    if len(arguments) == 2 and arguments[1] == "list":
        list_all(arguments[0])
    elif len(arguments) == 2 and arguments[1] == "verify":
        verify_all(arguments[0])
    elif len(arguments) == 6 and arguments[1] == "wal":
        root, _, cluster, system, name, target = arguments
        content = wal_content(root, cluster, system, name)
        with open(target, "xb") as file:
            file.write(content)
    elif len(arguments) == 5 and arguments[1] == "backup":
        root, _, cluster, backup, target = arguments
        extract_backup(root, cluster, backup, target)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (Damaged, OSError, KeyError, ValueError) as error:
        sys.exit(f"damaged or unreadable: {error}")
