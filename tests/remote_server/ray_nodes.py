"""Run a Ray cluster of two nodes on this machine until standard input ends. The process prints the cluster's address.

The argument is the folder for Ray's files.
"""

import os
import sys

from ray.cluster_utils import Cluster


def main(folder: str) -> None:
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "temp_dir": folder, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        print(f"address {cluster.address}", flush=True)
        while os.read(sys.stdin.fileno(), 1024):
            pass
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
