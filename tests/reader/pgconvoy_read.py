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


def crc_table(polynomial):
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (polynomial if byte & 1 else 0)
        table.append(byte)
    return table


CRC32C_TABLE, CRC64_TABLE = crc_table(0x82F63B78), crc_table(0x9A6C9329AC4BC9B5)


def crc32c(data):
    crc, table = 0xFFFFFFFF, CRC32C_TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def crc64(data):
    """CRC-64/NVME."""
    crc, table = 0xFFFFFFFFFFFFFFFF, CRC64_TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFFFFFFFFFF


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
    size = header["frames_size"]
    frames, changes = data[end + 4 :][:size], data[end + 4 :][size:]
    need(header["encoding"] == "zstd", f"{key}: encoding {header['encoding']}")
    need(len(frames) == header["frames_size"], f"{key}: {len(frames)} bytes of frames")
    need(hashlib.sha256(frames).hexdigest() == header["frames_sha256"], f"{key}: digest of the frames")
    content = decompress(frames)
    need(len(changes) <= header.get("changes", {"size": 0})["size"], f"{key}: more bytes than the header promises")
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


def check_changes(data, header, key):
    """What follows the frames and tells of changes, which nobody needs who reads the file, is as it was written."""
    (length,) = struct.unpack_from("<I", data, 8)
    part = data[16 + length + header["frames_size"] :]
    promised = header.get("changes")
    if promised is None:
        need(not part, f"{key}: bytes behind the frames")
        return
    need(len(part) == promised["size"], f"{key}: {len(part)} bytes that tell of changes")
    need(hashlib.sha256(part).hexdigest() == promised["sha256"], f"{key}: digest of what tells of changes")
    magic, size = struct.unpack_from("<II", part)
    need(magic == 0x184D2A5C and size == len(part) - 8, f"{key}: what tells of changes is in no frame that is skipped")


def wal_content(root, cluster, system, name):
    """The content to serve for a WAL file name."""
    base = f"c/{cluster}/{system}"
    chosen = decided(root, base, name)
    if name.endswith(".history"):
        return history_content(root, base, name, chosen)
    directory = f"{base}/wal/{name[:8]}/{name[8:16]}/"
    found = [key for key in keys(root, directory) if key[len(directory) :].rsplit(".", 1)[0] == name]
    need(found, f"{name} is not archived")
    if chosen:
        found = [key for key in found if key.endswith("." + chosen)]
        need(found, f"{name}: the chosen content is not here")
        return read_wal_object(read(root, found[0]), found[0])[1]
    return canonical(name, [read_wal_object(read(root, key), key) for key in found])


def decided(root, base, name):
    """The fingerprint that an operator chose last for a name, if any."""
    decisions = keys(root, f"{base}/decision/{name}/")
    if not decisions:
        return None
    decision = json.loads(read(root, decisions[-1]))
    check_versions(decision, decisions[-1])
    return decision["fingerprint"]


def history_content(root, base, name, chosen):
    """A history has one key; a choice may be for one that is kept beside it."""
    key, apart = f"{base}/history/{name}", f"{base}/conflict/{name}.{chosen}"
    if chosen and apart in keys(root, f"{base}/conflict/"):
        key = apart
    header, content = read_wal_object(read(root, key), key)
    need(chosen in (None, "s" + header["sha256"][:32]), f"{name}: the chosen content is not here")
    return content


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
    found = {}
    for key in keys(root, f"c/{cluster}/root/"):
        number = int(key[-16:], 16)
        need(key == f"c/{cluster}/root/{number:016x}", f"{key}: no key of a root")
        data = read(root, key)
        need(data.startswith(b'{"root":') and data.endswith(b'"}\n'), f"{key}: no root")
        text, digest = data[len(b'{"root":') : -len(b',"sha256":"') - 67], data[-67:-3].decode()
        need(hashlib.sha256(text).hexdigest() == digest, f"{key}: digest")
        commit = json.loads(text)
        check_versions(commit, key, ROOT_PARTS)
        sorted_text = json.dumps(commit, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        need(sorted_text == text, f"{key}: not canonical")
        need(commit["generation"] == number and commit["cluster"] == cluster, f"{key}: says something else")
        found[number] = (commit, digest)
    newest = number = max(found, default=0)
    behind = None
    # Back from the newest; what lies under a number that is lost is not looked at.
    while number:
        need(number in found, f"{cluster}: root {number} is missing")
        commit, digest = found[number]
        need(behind in (None, digest), f"{cluster}: root {number} is not the one that the next goes on from")
        first, last = commit.get("lost") or (number, None)
        number, behind = (first if last == number - 1 else number) - 1, commit["previous_sha256"]
        need((behind is None) == (number == 0), f"{cluster}: root {number} is not what the next says it is")
    return found[newest][0] if found else None


# --- Backups --------------------------------------------------------------------------------------------------------


def read_frames(data, key):
    """Yields (file, offset, page numbers, content) of each frame in a range of a pack, and how long the frame is."""
    position, last = 0, None
    while position < len(data):
        need(position + 40 <= len(data), f"{key}: cut in a frame")
        stored, raw, file, encoding, pages, zero, offset = struct.unpack_from("<IIIBBHQ", data, position)
        end = position + 40 + 4 * pages + stored
        need(end <= len(data) and 0 < raw <= 65536 and stored <= raw, f"{key}: frame lengths at {position}")
        digest = hashlib.sha256(data[position : position + 24] + data[position + 40 : end]).digest()[:16]
        need(digest == data[position + 24 : position + 40], f"{key}: frame digest at {position}")
        need(pages <= 8 and zero == 0 and encoding in (0, 1), f"{key}: unknown frame at {position}")
        numbers = struct.unpack_from(f"<{pages}I", data, position + 40)
        body = data[position + 40 + 4 * pages : end]
        content = decompress(body) if encoding else body
        need(len(content) == raw, f"{key}: frame content at {position}")
        behind = offset + raw
        if pages:
            page = raw // pages
            need(page * pages == raw and offset == numbers[0] * page, f"{key}: pages at {position}")
            need(list(numbers) == sorted(set(numbers)), f"{key}: order of pages at {position}")
            behind = (numbers[-1] + 1) * page
        if last and last[:2] == (file, pages > 0):
            need(last[2] <= offset, f"{key}: order of frames at {position}")
        need(not last or last[0] <= file, f"{key}: order of frames at {position}")
        yield file, offset, numbers, content, end - position
        position, last = end, (file, pages > 0, behind)


def check_pack(data, key):
    """Checks a whole pack: trailer, table, sums, every frame."""
    need(data[:8] == PACK_MAGIC and data[-8:] == PACK_END, f"{key}: no pack")
    trailer = data[-56:]
    table_at, count, zero = struct.unpack_from("<QII", trailer)
    table = data[table_at:-56]
    need(zero == 0 and len(table) >= 32 * count, f"{key}: trailer")
    need(hashlib.sha256(table + trailer[:16]).digest() == trailer[16:48], f"{key}: digest of the table")
    position, sums = 8, 32 * count
    for number, (file, offset, numbers, content, length) in enumerate(read_frames(data[8:table_at], key)):
        need(number < count, f"{key}: more frames than entries")
        entry = struct.unpack_from("<IIQQIB", table, 32 * number) + (table[32 * number + 29 : 32 * number + 32],)
        (stored,) = struct.unpack_from("<I", data, position)
        expected = (file, len(content), offset, position, stored, len(numbers), b"\0\0\0")
        need(entry == expected, f"{key}: table entry {number}")
        unit = len(content) // len(numbers) if numbers else 8192
        own = [crc64(content[at : at + unit]) for at in range(0, len(content), unit)]
        own = struct.pack(f"<{len(numbers)}I{len(own)}Q", *numbers, *own)
        need(table[sums : sums + len(own)] == own, f"{key}: sums of frame {number}")
        position, sums = position + length, sums + len(own)
    need(position == table_at and sums == len(table), f"{key}: frames and table differ")


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
    check_versions(lines[0], key, ("layers",))
    databases = {read_bytes(database["name"]): database["oid"] for database in lines[0].get("databases", [])}
    need(len(databases) == len(lines[0].get("databases", [])), f"{key}: two databases of one name")
    of = lambda kind: [line for line in lines if line["line"] == kind]
    end = lines[-1]
    counts = {"tablespaces": "tablespace", "directories": "directory", "links": "link", "files": "file"}
    for name, kind in counts.items():
        need(end[name] == len(of(kind)), f"{key}: count of {name}")
    need(end["data_bytes"] == sum(file["size"] for file in of("file")), f"{key}: bytes of files")
    own = [pack["size"] for pack in of("pack") if "backup" not in pack]
    others = [pack["size"] for pack in of("pack") if "backup" in pack]
    need((end["packs"], end["pack_bytes"]) == (len(own), sum(own)), f"{key}: packs")
    inherited = (end["inherited_packs"], end["inherited_pack_bytes"])
    need(inherited == (len(others), sum(others)), f"{key}: inherited packs")
    packs = [(pack.get("backup", ""), pack["number"]) for pack in of("pack")]
    need(packs == sorted(set(packs)), f"{key}: order of packs")
    numbers = [file["number"] for file in of("file")]
    need(numbers == sorted(set(numbers)), f"{key}: order of files")
    for file in of("file"):
        check_layers(file, lines[0], set(packs), key)
    return lines


def check_layers(line, head, packs, key):
    """The layers of a file against the head and the list of packs."""
    layers, path = line["layers"], line["path"]
    plain = len(layers) <= 1 and not any("backup" in layer or "file" in layer for layer in layers)
    plain = plain and not any("pages" in extent for layer in layers for extent in layer["extents"])
    need(plain or "layers" in head.get("critical", []), f"{path}: the head says nothing of layers")
    age = {backup: number for number, backup in enumerate(head["references"])}
    age[None] = len(age)
    ages = [age[layer.get("backup")] for layer in layers]
    need(ages == sorted(set(ages), reverse=True), f"{path}: order of layers")
    held = []
    for layer in layers:
        at = 0
        for extent in layer["extents"]:
            need(at <= extent["from"] < extent["to"], f"{path}: order of extents")
            at = extent["to"]
            need((layer.get("backup", ""), extent["pack"]) in packs, f"{path}: pack {extent['pack']} is not listed")
            if "pages" not in extent:
                held.append((extent["from"], extent["to"]))
    reached = 0
    for begin, end in sorted(held):
        need(begin <= reached or reached >= line["size"], f"{path}: no content from {reached}")
        reached = max(reached, end)
    need(reached >= line["size"], f"{path}: no content from {reached}")


def file_content(root, cluster, head, line):
    """The content of one file of a backup: its layers, the oldest first."""
    content, path = bytearray(), line["path"]
    for layer in reversed(line["layers"]):
        number = layer.get("file", line["number"])
        for extent in layer["extents"]:
            key = f"c/{cluster}/b/{layer.get('backup', head['backup'])}/p/{extent['pack']:06}"
            with open(os.path.join(root, key), "rb") as pack:
                pack.seek(extent["offset"])
                data = pack.read(extent["length"])
            need(len(data) == extent["length"], f"{key}: cut")
            pieces = []
            for file, offset, numbers, raw, _ in read_frames(data, key):
                need(file == number and bool(numbers) == ("pages" in extent), f"{key}: holds another file's frame")
                size = len(raw) // len(numbers) if numbers else len(raw)
                need(not numbers or size == head["block_size"], f"{key}: pages of {size} bytes")
                starts = [page * size for page in numbers] or [offset]
                pieces += [(start, raw[at * size : at * size + size]) for at, start in enumerate(starts)]
            need(pieces[0][0] == extent["from"], f"{path}: an extent begins elsewhere")
            need(pieces[-1][0] + len(pieces[-1][1]) == extent["to"], f"{path}: an extent ends elsewhere")
            held = sum(len(piece) for _, piece in pieces)
            expected = extent["pages"] * head["block_size"] if "pages" in extent else extent["to"] - extent["from"]
            need(held == expected, f"{path}: an extent holds {held} bytes")
            for start, piece in pieces:
                content.extend(bytes(max(0, start - len(content))))
                content[start : start + len(piece)] = piece
    need(len(content) >= line["size"], f"{path}: {len(content)} bytes")
    content = bytes(content[: line["size"]])
    need(line.get("crc32c") in (None, crc32c(content)), f"{path}: checksum")
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
                file.write(file_content(root, cluster, head, line))
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
        key = f"c/{cluster}/b/{pack.get('backup', entry['backup'])}/p/{pack['number']:06}"
        data = read(root, key)
        need(len(data) == pack["size"], f"{key}: size")
        need(hashlib.sha256(data).hexdigest() == pack["sha256"], f"{key}: digest")
        check_pack(data, key)
    for line in lines:
        if line["line"] == "file":
            file_content(root, cluster, lines[0], line)
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
                data = read(root, key)
                header, _ = read_wal_object(data, key)
                check_changes(data, header, key)
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
