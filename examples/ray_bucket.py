"""A bucket of images to Parquet by Ray Data, an encoder on each GPU: columns path, embedding, rows and error.

python examples/ray_bucket.py s3://photos/2026 s3://vectors/2026 --checkpoint Qwen/Qwen3-VL-8B-Instruct --encoders 8

Buckets and folders are whatever pyarrow reads: s3://, gs://, abfs://, a path. On a cluster: ray job submit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import ray.data

from fused_vit.ray import Encoder

KINDS = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"]


def embedded(
    source: str, checkpoint: str, *, encoders: int = 1, gpus: float = 1, cpus: int = 4, batch: int = 256, **options: Any
) -> ray.data.Dataset:
    """The images of `source` through `encoders` actors, each with so many GPUs, and CPUs to decode on.

    The cluster needs a CPU more than the actors take: Ray's tasks that read and write run beside them.
    """
    images = ray.data.read_binary_files(source, include_paths=True, file_extensions=KINDS)
    return images.map_batches(
        Encoder,
        fn_constructor_kwargs={"checkpoint": checkpoint, "workers": cpus, **options},
        batch_size=batch,
        num_gpus=gpus,
        num_cpus=cpus,
        compute=ray.data.ActorPoolStrategy(size=encoders),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("vectors", help="where the Parquet files go")
    parser.add_argument("--checkpoint", required=True, help="a folder that every node sees, or a hub id")
    parser.add_argument("--encoders", type=int, default=1, help="actors, one for each GPU")
    parser.add_argument("--gpus", type=float, default=1, help="of an actor; 0 runs on CPUs")
    parser.add_argument("--cpus", type=int, default=4, help="of an actor, to decode on")
    given = parser.parse_args(argv)
    found = embedded(given.source, given.checkpoint, encoders=given.encoders, gpus=given.gpus, cpus=given.cpus)
    found.write_parquet(given.vectors, mode=ray.data.SaveMode.ERROR)  # or a second run would add every row again
    rows = ray.data.read_parquet(given.vectors).select_columns(["path", "error"])
    failed = rows.filter(lambda row: row["error"] != "").take_all()
    print(f"{rows.count()} images in {given.vectors}, {len(failed)} failed")
    for row in failed[:10]:
        print(f"failed: {row['path']}: {row['error']}")


if __name__ == "__main__":
    main()
