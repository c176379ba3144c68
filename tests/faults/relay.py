"""A bad network: packets between TUN devices in network namespaces, lost, held up, thinned out and cut off on request.

As a script, `relay.py SETTINGS`: JSON with `ends`, a namespace and an IPv4 address each, the server's first; `loss`
(probability of a packet in each direction), `delay` (seconds, each way), `rate` (bytes per second of each client in each
direction; 0: without limit) and `seed`. A line on its input cuts everybody off for so many seconds. Linux, as root.
"""

import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field

SET_DEVICE, TUN_WITHOUT_HEADER = 0x400454CA, 0x1001  # linux/if_tun.h: TUNSETIFF; IFF_TUN | IFF_NO_PI
LONGEST_PACKET = 1500
MOST_WAITING_BYTES = 65_536  # of one client in one direction; what comes on top is dropped, as by tbf


def make_end(namespace: str, address: str) -> int:
    """Make a namespace with one device in it; return the device's other side."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    name = f"t{namespace}"
    fcntl.ioctl(device, SET_DEVICE, struct.pack("16sH22x", name.encode(), TUN_WITHOUT_HEADER))
    _ip("netns", "add", namespace)
    _ip("link", "set", name, "netns", namespace)
    _ip("-n", namespace, "address", "add", f"{address}/24", "dev", name)
    for each in ("lo", name):
        _ip("-n", namespace, "link", "set", each, "up")
    return device


def _ip(*argv: str) -> None:
    subprocess.run(["ip", *argv], check=True)


@dataclass
class Relay:
    """Decides which packet arrives when."""

    ends: dict[bytes, int]  # the device of each address
    server: bytes
    loss: float
    delay: float
    rate: float
    draw: random.Random
    cut_until: float = 0.0
    free_at: dict[tuple[bytes, bool], float] = field(default_factory=dict[tuple[bytes, bool], float])
    due: list[tuple[float, int, bytes]] = field(default_factory=list[tuple[float, int, bytes]])
    count: int = 0

    def take(self, packet: bytes, now: float) -> None:
        source, destination = packet[12:16], packet[16:20]
        if packet[0] >> 4 != 4 or destination not in self.ends or now < self.cut_until:
            return
        if self.draw.random() < self.loss:
            return
        sent = now
        if self.rate:
            upwards = destination == self.server
            lane = (source if upwards else destination, upwards)
            free = max(now, self.free_at.get(lane, 0.0))
            if (free - now) * self.rate > MOST_WAITING_BYTES:
                return
            sent = self.free_at[lane] = free + len(packet) / self.rate
        self.count += 1
        heapq.heappush(self.due, (sent + self.delay, self.count, packet))

    def deliver(self, now: float) -> float | None:
        """Deliver what is due; return the seconds to the next."""
        while self.due and self.due[0][0] <= now:
            packet = heapq.heappop(self.due)[2]
            if now >= self.cut_until:
                os.write(self.ends[packet[16:20]], packet)
        return self.due[0][0] - now if self.due else None

    def work(self, orders: int) -> None:
        """Go on until nobody is left to give orders."""
        while True:
            ready, _, _ = select.select([*self.ends.values(), orders], [], [], self.deliver(time.monotonic()))
            now = time.monotonic()
            for device in ready:
                if device != orders:
                    self.take(os.read(device, LONGEST_PACKET), now)
                elif not (order := os.read(orders, 64)):
                    return
                else:
                    self.cut_until = now + float(order)


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    made = {bytes(map(int, a.split("."))): make_end(n, a) for n, a in told["ends"]}
    print("ready", flush=True)
    first = next(iter(made))
    Relay(made, first, told["loss"], told["delay"], told["rate"], random.Random(told["seed"])).work(0)
