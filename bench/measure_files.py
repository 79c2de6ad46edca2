"""Measure a student's ONNX files as a stranger would: with onnxruntime, numpy and Pillow, and no code of Distillery.

    python bench/measure_files.py FOLDER ARCHIVE

FOLDER has the files of a job: `student.onnx`, `student.int8.onnx`, `report.json`. ARCHIVE has its test images: a `.zip`
of `test/<class>/<picture>`, or a `.npz` of uint8 `x_test` (N x H x W x C, in the network's size) and `y_test`. What the
files need to know stands in their own metadata. Prints each figure beside that of the report; exit status 1 if an
accuracy or an agreement differs by more than one image, or if size or digest differ.
"""

import hashlib
import io
import json
import os
import sys
import time
import zipfile
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime

BATCH = 32
LATENCY_S = 1.0


def opened(path, threads):
    """Return a session and the facts in the file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session, json.loads(session.get_modelmeta().custom_metadata_map["distillery"])


def test_images(archive, facts):
    """Return uint8 pixels N x C x H x W in the network's size, and labels."""
    if archive.suffix == ".npz":
        arrays = np.load(archive)
        return arrays["x_test"].transpose(0, 3, 1, 2), arrays["y_test"]
    from PIL import Image

    names = facts["class_names"]
    pixels, labels = [], []
    with zipfile.ZipFile(archive) as opened_archive:
        for path in sorted(opened_archive.namelist()):
            parts = path.split("/")
            if len(parts) >= 3 and parts[-3] == "test" and parts[-2] in names and parts[-1]:
                with Image.open(io.BytesIO(opened_archive.read(path))) as picture:
                    pixels.append(fitted(picture.convert("RGB"), facts))
                labels.append(names.index(parts[-2]))
    return np.stack(pixels).transpose(0, 3, 1, 2), np.array(labels)


def fitted(picture, facts):
    """Return a picture in the network's size: its shorter side resized, and the centre cut out."""
    from PIL import Image

    data = facts["spec"]["dataset"]
    if data.get("resize", "crop") != "crop" or data.get("interpolation", "bilinear") != "bilinear":
        raise SystemExit(f"this program resizes by crop and bilinear only, not as {data}")
    height, width = facts["image_size"]
    target, shorter = data.get("resize_to") or height, min(picture.size)
    resized = picture.resize(tuple(target * side // shorter for side in picture.size), Image.Resampling.BILINEAR)
    left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
    return np.asarray(resized.crop((left, top, left + width, top + height)))


def inputs(pixels, facts):
    """Return the input of a file."""
    images = pixels.astype(np.float32) / 255
    if facts["normalization"] == "inside":
        return images
    mean, std = (np.array(facts[name], np.float32)[:, None, None] for name in ("mean", "std"))
    return (images - mean) / std


def answers(session, images):
    """Return the class that a file names for each image."""
    parts = [session.run(None, {"images": images[at : at + BATCH]})[0] for at in range(0, len(images), BATCH)]
    return np.concatenate(parts).argmax(1)


def median_ms(session, images):
    """Return the median time of a run, in ms."""
    for _ in range(5):
        session.run(None, {"images": images})
    times, began = [], time.perf_counter()
    while len(times) < 5 or (len(times) < 200 and time.perf_counter() - began < LATENCY_S):
        before = time.perf_counter()
        session.run(None, {"images": images})
        times.append(1000 * (time.perf_counter() - before))
    return sorted(times)[len(times) // 2]


def main(folder, archive):
    rows = [row for row in json.loads((folder / "report.json").read_text())["files"] if row["name"].endswith(".onnx")]
    rows = [row for row in rows if row["refused"] is None]
    if not rows or rows[0]["name"] != "student.onnx":
        raise SystemExit(f"{folder} has no student.onnx")
    reference, fine, medians, reported = None, True, {}, {}
    print(f"{'file':20}{'':>12}{'report':>12}{'here':>12}{'difference':>14}")
    for row in rows:
        path = folder / row["name"]
        session, facts = opened(path, row["threads"])
        pixels, labels = test_images(archive, facts)
        images = inputs(pixels, facts)
        found = answers(session, images)
        reference = found if reference is None else reference
        count, content = len(labels), path.read_bytes()
        for name, here in (("accuracy", (found == labels).sum()), ("agreement", (found == reference).sum())):
            difference = int(here) - round(row[name] * row["images"])
            fine &= count == row["images"] and abs(difference) <= 1
            print(f"{row['name']:20}{name:>12}{row[name]:>12.4%}{here / count:>12.4%}{difference:>+7d} images")
        same = len(content) == row["bytes"] and hashlib.sha256(content).hexdigest() == row["sha256"]
        fine &= same
        print(f"{row['name']:20}{'bytes':>12}{row['bytes']:>12,}{len(content):>12,}{'exact' if same else 'OTHER':>14}")
        for one in row["latency"]:
            size = int(one["batch"])
            here = median_ms(session, images[:size] if count >= size else np.resize(images, (size, *images.shape[1:])))
            medians[row["name"], size], reported[row["name"], size] = here, one["p50_ms"]
            label, ratio = f"p50, {size}", f"x {here / one['p50_ms']:.2f}"
            print(f"{row['name']:20}{label:>12}{one['p50_ms']:>9.2f} ms{here:>9.2f} ms{ratio:>14}")
    for name, size in medians:
        if name != rows[0]["name"]:
            before, here = (of[name, size] / of[rows[0]["name"], size] for of in (reported, medians))
            label = f"of float, {size}"
            print(f"{name:20}{label:>12}{before:>12.2f}{here:>12.2f}{'':>14}")
    print("the same figures" if fine else "OTHER FIGURES than the report's")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
