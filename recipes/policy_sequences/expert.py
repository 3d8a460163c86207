"""A scripted expert for Push-T (gym-pusht) that plans pushes in closed form, and its demonstrations.

gym-pusht's block has no friction with the pusher, and the space forgets all velocities at every physics step. So a push
at a fixed point of a face moves the block with a constant twist in its own frame: with inward normal n, lever
c = r x n about the centre of mass, mass 1 and inertia I, a push by d turns it by d (c / I) / (1 + c^2 / I) and moves
its centre of mass along the matching arc. The expert searches all pairs of such pushes for the quickest way to the
goal, walks round the block to the first one, pushes, and chooses again when pushing on no longer helps.

Points are complex numbers (x + iy, pixels); body-frame points are relative to the block's centre of mass.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

RADIUS = 15.0  # of the pusher
COM = 45j  # the block's centre of mass, from its position (the middle of the bar's outer edge), in its own frame
INERTIA = 3000.0  # of the block, whose mass is 1
GYRATION = 44.0  # root mean square distance of the block's area from its centre of mass
GOAL, GOAL_ANGLE = 256 + 256j + COM * np.exp(0.25j * np.pi), 0.25 * np.pi

# The T as two boxes (x low, x high, y low, y high): its bar and its stem. Corners are enough to test it against walls.
BOXES = np.array([[-60.0, 60.0, -45.0, -15.0], [-15.0, 15.0, -15.0, 75.0]])
CORNERS = np.array([x + 1j * y for x0, x1, y0, y1 in BOXES for x in (x0, x1) for y in (y0, y1)])
CLEAR, GAP = 17.0, 10.0  # the pusher's centre walks CLEAR of the block; a push starts GAP from touching
NODES = np.array([-85 - 70j, 85 - 70j, -85 + 10j, 85 + 10j, -40 + 100j, 40 + 100j])  # round its corners
WALLS = (8.0, 503.0)  # where the block can be
REACH = (3.0, 509.0)  # where the pusher's centre may go

FREE_LEAD, PUSH_LEAD = 50.0, 17.5  # how far ahead of the pusher its target lies; it moves 0.4 of that a step
FREE_SPEED, PUSH_SPEED, SWITCH = 18.0, 6.0, 5.0  # pixels a step, and steps lost in each change of contact
DISTANCES = np.array([1, 2, 3.5, 5.5, 8, 12, 17, 23, 30, 38, 48, 60, 75, 92, 112, 135, 160, 190, 225, 265, 310])


class Demonstration(NamedTuple):
    """One episode: states (n + 1, 5) and actions (n, 2) in pixels and radians."""

    states: np.ndarray
    actions: np.ndarray
    success: bool


class Contacts(NamedTuple):
    """Where to push, in the block's frame: points on its edge and inward unit normals, each (C,)."""

    point: np.ndarray
    normal: np.ndarray

    def behind(self, gap: float) -> np.ndarray:
        """Centres (C,) of the pusher when it is ``gap`` pixels from touching."""
        return self.point - (RADIUS + gap) * self.normal

    def push(self, distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Moves (C, D) complex and turns (C, D) of the block, in its frame, for push distances (D,)."""
        lever = (self.point.conj() * self.normal).imag[:, None]
        give = distance / (1 + lever**2 / INERTIA)
        turn = give * lever / INERTIA
        return self.normal[:, None] * give * np.exp(0.5j * turn) * np.sinc(turn / (2 * np.pi)), turn


def contacts() -> Contacts:
    """Points along every face, away from its ends and from the inner corners, where the pusher would touch twice."""
    along = np.linspace
    faces = [(along(-52, 52, 11) - 45j, 1j), (along(-8, 8, 3) + 75j, -1j)]
    for side in (-1, 1):
        faces += [
            (side * 60 + 1j * along(-37, -23, 3), -side),
            (side * along(33, 52, 4) - 15j, -1j),
            (side * 15 + 1j * along(3, 67, 9), -side),
        ]
    return Contacts(np.concatenate([p for p, _ in faces]), np.concatenate([np.full(len(p), n) for p, n in faces]))


def blocked(start: np.ndarray, end: np.ndarray, clear: float = CLEAR) -> np.ndarray:
    """Whether straight lines between broadcast body-frame points come nearer the block than ``clear``."""
    hit = np.zeros(np.broadcast(start, end).shape, dtype=bool)
    step = end - start
    for x0, x1, y0, y1 in BOXES:
        first, last = np.zeros(hit.shape), np.ones(hit.shape)
        for origin, move, low, high in ((start.real, step.real, x0, x1), (start.imag, step.imag, y0, y1)):
            move = np.where(np.abs(move) < 1e-9, 1e-9, move)
            enter, leave = (low - clear - origin) / move, (high + clear - origin) / move
            first, last = np.maximum(first, np.minimum(enter, leave)), np.minimum(last, np.maximum(enter, leave))
        hit |= first < last
    return hit


def lengths(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Lengths (S, E) of the straight lines between body-frame points; infinite where the block is in the way."""
    start, end = start[:, None], end[None, :]
    return np.where(blocked(start, end), np.inf, np.abs(end - start))


def step_out(point: complex) -> complex:
    """The nearest body-frame point with room to walk, if ``point`` is too near the block; else the point itself."""
    if not blocked(np.array(point), np.array(point)):
        return point
    x, y, room = point.real, point.imag, CLEAR + 4
    sides = [complex(edge, y) for x0, x1, _, _ in BOXES for edge in (x0 - room, x1 + room)]
    exits = sides + [complex(x, edge) for _, _, y0, y1 in BOXES for edge in (y0 - room, y1 + room)]
    free = [e for e in exits if not blocked(np.array(e), np.array(e))]
    return min(free, key=lambda e: abs(e - point))


def residual(place: np.ndarray, heading: np.ndarray) -> np.ndarray:
    """Steps that putting right a pose is guessed to take: its place (pixels) and unit heading, relative to the goal.

    One term for not being there (coverage passes 0.95 at about 2 pixels), one for being 10 pixels off or more, and one
    that grows without bound. Together they outweigh any push that helps, or the plan might be to give up.
    """
    square = np.abs(place) ** 2 + 2 * GYRATION**2 * (1 - heading.real)  # mean over the block's area, pixels^2
    return 40 * square**2 / (square**2 + 5) + 40 * square / (square + 100) + np.sqrt(np.abs(square))


def beyond(world: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    """How far (pixels) world points lie outside a square, at most 0 inside."""
    low, high = bounds
    x, y = world.real, world.imag
    return np.maximum.reduce([low - x, x - high, low - y, y - high])


def unreachable(world: np.ndarray) -> np.ndarray:
    """A prohibitive cost for each world point where the pusher cannot stand."""
    return 1000.0 * (beyond(world, REACH) > 0)


class Expert:
    """Maps states (agent x, y, block x, y in pixels, block angle in radians) to the pusher's next target (x, y)."""

    def __init__(self) -> None:
        self.contacts = contacts()
        self.touch, self.stand = self.contacts.behind(0), self.contacts.behind(GAP)  # (C,) pusher centres
        self.moves, self.turns = self.contacts.push(DISTANCES)  # (C, D)
        self.spins = np.exp(1j * self.turns).astype(np.complex64)  # single precision: `after` is all the work there is
        self.nodes, self.between = lengths(NODES, NODES), lengths(self.stand, self.stand)
        self.to_nodes, self.from_nodes = lengths(self.stand, NODES), lengths(NODES, self.stand)
        self.contact = -1  # none chosen
        self.last = -1  # the contact before, which cannot be chosen again at once
        self.pushing = False  # or still walking to the contact

    def __call__(self, state: np.ndarray) -> np.ndarray:
        """The next action (2,) float32 for a state (5,)."""
        angle = float(state[4])
        spin = complex(np.exp(1j * angle))
        center = complex(state[2], state[3]) + spin * COM
        local = (complex(state[0], state[1]) - center) / spin
        distance = self.remaining(center, angle) if self.pushing else 0.0
        if self.contact < 0 or (self.pushing and distance < 0.5):
            self.last, self.pushing = self.contact, False
            self.contact = self.choose(local, center, angle)
        offset = (local - self.touch[self.contact]) / self.contacts.normal[self.contact]  # along the push, and aside
        if not self.pushing and abs(offset.imag) < 4 and -GAP - 4 < offset.real < 4:
            self.pushing, distance = True, self.remaining(center, angle)
        target = self.ahead(offset.real, distance) if self.pushing else self.route(local, center, spin)
        target = center + spin * target
        return np.clip(np.array([target.real, target.imag]), *REACH).astype(np.float32)

    def chosen(self) -> Contacts:
        """The chosen contact, alone."""
        return Contacts(self.contacts.point[[self.contact]], self.contacts.normal[[self.contact]])

    def ahead(self, reached: float, distance: float) -> complex:
        """The next target, in the block's frame, of a push: the contact point, where the push will have moved it."""
        lead = min(PUSH_LEAD + min(reached, 0.0), distance)
        move, turn = self.chosen().push(np.array([max(lead, 0.0)]))
        short = self.contacts.normal[self.contact] * min(lead, 0.0)
        return complex(move[0, 0] + np.exp(1j * turn[0, 0]) * (self.touch[self.contact] + short))

    def choose(self, local: complex, center: complex, angle: float) -> int:
        """The contact whose push, followed by the best second push or none, is the quickest way to the goal."""
        spin = np.exp(1j * angle)
        nodes = self.nodes + unreachable(center + spin * NODES)
        out = step_out(local)
        start = np.array([out])
        approach = walk(lengths(start, NODES), nodes, self.from_nodes, lengths(start, self.stand))[0]
        first = SWITCH + (approach + abs(out - local) + GAP) / FREE_SPEED + unreachable(center + spin * self.stand)
        if self.last >= 0:
            first[self.last] += 1000.0
        total = first[:, None] + DISTANCES / PUSH_SPEED
        for i in range(len(total)):
            total[i] += self.after(center, angle, i, self.moves[i], self.turns[i])
        return int(np.unravel_index(np.argmin(total), total.shape)[0])

    def remaining(self, center: complex, angle: float) -> float:
        """How much further to push at the present contact (pixels), from a coarse search and two finer ones."""
        here = self.chosen()

        def best(distances: np.ndarray) -> float:
            moves, turns = here.push(distances)
            after = self.after(center, angle, self.contact, moves[0], turns[0])
            return float(distances[np.argmin(distances / PUSH_SPEED + after)])

        distance = best(np.append(0.0, DISTANCES))
        for spread in (0.1, 0.02):
            distance = best(np.maximum(distance + spread * max(distance, 5.0) * np.arange(-3, 4), 0))
        return distance

    def after(self, center: complex, angle: float, contact: int, move: np.ndarray, turn: np.ndarray) -> np.ndarray:
        """Steps to the goal (B,) after pushes at ``contact`` with these moves and turns (B,).

        The plan goes on with one push at another contact, or with none; what is left of the error is guessed.
        """
        spin = np.exp(1j * (angle + turn))[:, None]  # (B, 1)
        center = center + np.exp(1j * angle) * move[:, None]
        stuck = np.maximum(beyond(center + spin * CORNERS, WALLS).max(1), 0)
        place, heading = center - GOAL, spin * np.exp(-1j * GOAL_ANGLE)
        nodes = self.nodes + unreachable(center + spin * NODES)[:, None, :]
        travel = walk(self.to_nodes[[contact]], nodes, self.from_nodes, self.between[[contact]])[:, 0] + 2 * GAP
        second = SWITCH + travel / FREE_SPEED + unreachable(center + spin * self.stand)  # (B, C)
        second[:, contact] = np.inf
        at, to, spin = (x.astype(np.complex64)[:, None] for x in (place, heading, spin))
        ends = residual(at + spin * self.moves.astype(np.complex64), to * self.spins)  # (B, C, D)
        second = second + (DISTANCES / PUSH_SPEED + ends).min(2)
        return np.minimum(second.min(1), residual(place, heading)[:, 0]) + 100 * stuck

    def route(self, local: complex, center: complex, spin: complex) -> complex:
        """The next target, in the block's frame, on the way round the block to the chosen contact."""
        stand = self.stand[[self.contact]]
        away = unreachable(center + spin * NODES)
        final = self.from_nodes[:, [self.contact]]
        onward = walk(self.nodes + away, self.nodes + away, final, final)[:, 0]
        path = [local, step_out(local)]
        while blocked(np.array(path[-1]), stand)[0] and len(path) < 9:
            here = np.array([path[-1]])
            cost = lengths(here, NODES)[0] + onward + away
            path.append(NODES[np.argmin(np.where(here == NODES, np.inf, cost))])
        path += [stand[0], self.touch[self.contact]]
        for lead in np.arange(FREE_LEAD, 10, -4):  # the longest that does not cut a corner
            target = along_path(path, lead)
            if path[0] != path[1] or not blocked(np.array(local), np.array(target), RADIUS + 1):
                return target
        return along_path(path, 10)


def walk(start: np.ndarray, nodes: np.ndarray, end: np.ndarray, direct: np.ndarray) -> np.ndarray:
    """Shortest lengths (S, E): direct, or over the nodes; from lengths (S, N), (N, N), (N, E) and (S, E)."""
    for i in range(nodes.shape[-1]):
        nodes = np.minimum(nodes, nodes[..., :, [i]] + nodes[..., [i], :])
    over = (start[..., :, :, None] + nodes[..., None, :, :]).min(-2)
    return np.minimum(direct, (over[..., None] + end).min(-2))


def along_path(path: list[complex], lead: float) -> complex:
    """The point ``lead`` pixels along a polyline, or its end."""
    for a, b in pairwise(path):
        if lead <= abs(b - a):
            return a + (b - a) * lead / max(abs(b - a), 1e-9)
        lead -= abs(b - a)
    return path[-1]


def make_env() -> Any:
    """Push-T with states as observations; without gymnasium's wrappers, so without its limit of 300 steps."""
    try:
        from gym_pusht.envs import PushTEnv
    except ImportError as missing:
        raise ImportError("Push-T needs gym-pusht: pip install 'shortcutflow[policy]'") from missing
    return PushTEnv(obs_type="state")


def demonstrate(seed: int, max_steps: int = 300, disturbance: float = 4.0) -> Demonstration:
    """Let the expert play the episode that the environment starts from ``seed``, until success or ``max_steps``.

    The push that succeeds is carried to its end, which is nearer to the goal than 95 % coverage: a policy that imitates
    it aims at the goal itself. The action that is executed has a slowly changing disturbance (standard deviation of
    its increments in pixels) that the recorded action lacks, so demonstrations show the way back from small mistakes,
    which a policy will make (Laskey et al., arXiv 1703.09327).
    """
    env, expert = make_env(), Expert()
    state, _ = env.reset(seed=seed)
    states, success = [state], False
    actions: list[np.ndarray] = []
    rng, push = np.random.default_rng(seed), np.zeros(2)
    while len(actions) < max_steps:
        action = expert(state)
        if success and not expert.pushing:
            break
        actions.append(action)
        push = 0.7 * push + rng.normal(scale=disturbance, size=2)
        state, _, reached, _, _ = env.step(np.clip(action + push, *REACH).astype(np.float32))
        success = success or reached
        states.append(state)
    env.close()
    return Demonstration(np.array(states, np.float32), np.array(actions, np.float32).reshape(-1, 2), bool(success))
