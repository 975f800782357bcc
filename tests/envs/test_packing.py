"""Dict and Tuple observations and masks as packed rows: round trips, and one clear error per mistake."""

import json

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo.envs.pack_observation import PackObservation, mask_under_key, n_choices, packed_space
from fastppo.errors import ConfigError, EnvError
from fastppo.spaces.leaves import ObsLeaf
from fastppo.spaces.observations import ObsSpec
from fastppo.spaces.packing import PackedSpace, flat_mask, leaves_of, mask_leaf
from tests.envs.trees import scene

CAMERA = spaces.Box(0, 255, (37, 37, 1), np.uint8)


@st.composite
def single_spaces(draw):
    shape = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    kind = draw(st.sampled_from(["float32", "float64", "int16", "image", "float image", "index", "indices", "bits"]))
    if kind.startswith(("float3", "float6", "int")):
        return spaces.Box(-100, 100, shape, np.dtype(kind).type)
    if kind == "image":
        return spaces.Box(0, 255, draw(st.sampled_from([(37, 37, 1), (36, 38), (3, 37, 39)])), np.uint8)
    if kind == "float image":
        return spaces.Box(0, 1, (36, 36, 3), np.float32)
    if kind == "index":
        return spaces.Discrete(draw(st.integers(1, 5)), start=draw(st.integers(-3, 3)))
    nvec = np.array(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    return spaces.MultiDiscrete(nvec, start=nvec - 2) if kind == "indices" else spaces.MultiBinary(len(nvec))


def trees(parts):
    keys = st.sampled_from("abcdef")
    return st.dictionaries(keys, parts, min_size=1, max_size=3).map(spaces.Dict) | st.lists(
        parts, min_size=1, max_size=3
    ).map(lambda found: spaces.Tuple(found))


TREES = trees(st.recursive(single_spaces(), trees, max_leaves=4))
MASKS = st.none() | st.integers(2, 6).map(lambda n: mask_leaf("info", n))


def sample(space, n, seed):
    """Return n observations, and the same ones as a batch."""
    space.seed(seed)
    singles = [space.sample() for _ in range(n)]
    return singles, stacked(singles)


def stacked(singles):
    if isinstance(singles[0], dict):
        return {key: stacked([x[key] for x in singles]) for key in singles[0]}
    if isinstance(singles[0], tuple):
        return tuple(stacked([x[i] for x in singles]) for i in range(len(singles[0])))
    return np.stack(singles)


def tensors(tree):
    if isinstance(tree, dict):
        return {key: tensors(x) for key, x in tree.items()}
    return tuple(map(tensors, tree)) if isinstance(tree, tuple) else torch.from_numpy(tree)


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


@settings(max_examples=60, deadline=None)
@given(space=TREES, mask=MASKS, seed=st.integers(0, 1000))
def test_rows_hold_exactly_what_the_environment_gave(space, mask, seed):
    packed = PackedSpace(leaves_of(space, mask=mask))
    spec = ObsSpec.from_space(packed)
    singles, batch = sample(space, 3, seed)
    allowed = None if mask is None else np.random.default_rng(seed).random((3, mask.size)) < 0.5

    rows = packed.pack(batch, allowed, n=3)
    assert rows.shape == (3, *spec.shape)
    assert (rows.dtype, spec.source_dtype) == (packed.dtype, str(packed.dtype))
    one_by_one = [packed.pack(x, None if mask is None else allowed[i]) for i, x in enumerate(singles)]
    assert np.stack(one_by_one).tobytes() == rows.tobytes()
    from_torch = spec.pack_tree(tensors(batch), None if mask is None else torch.from_numpy(allowed))
    assert from_torch.to(spec.dtype).numpy().tobytes() == rows.tobytes()

    arrays = spec.unpack(torch.from_numpy(rows))
    assert len(arrays) == len(spec.leaves)
    for leaf, array in zip(spec.leaves, arrays, strict=True):
        assert (tuple(array.shape), str(array.dtype)) == ((3, *leaf.shape), f"torch.{leaf.stored_as}")
        true = allowed if leaf.kind == "mask" else at(batch, leaf.path)
        assert np.array_equal(array.numpy(), true.astype(leaf.stored_as))
    assert torch.equal(spec.pack(arrays).to(spec.dtype), torch.from_numpy(rows))
    if mask is not None:
        assert np.array_equal(packed.allowed(rows), allowed)
        assert np.array_equal(spec.allowed(torch.from_numpy(rows)).numpy(), allowed)
    else:
        assert packed.allowed(rows) is None
        assert spec.allowed(torch.from_numpy(rows)) is None


@settings(max_examples=60, deadline=None)
@given(space=TREES, mask=MASKS)
def test_specs_survive_json_and_blank_rows_are_observations(space, mask):
    spec = ObsSpec(leaves_of(space, mask=mask))
    assert ObsSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert ObsSpec.from_space(spec.space) == spec
    blank = spec.blank(2, 3)
    assert (blank.shape, blank.dtype) == ((2, 3, *spec.shape), spec.dtype)
    for leaf, array in zip(spec.leaves, spec.unpack(blank[0]), strict=True):
        if leaf.kind == "discrete":
            assert leaf.outside(array.numpy()) is None
        else:
            assert (array == (leaf.kind == "mask")).all()
    assert spec.finite(blank).all()


def test_a_row_is_finite_if_every_float_in_it_is():
    spec = ObsSpec(leaves_of(spaces.Dict(camera=CAMERA, x=spaces.Box(-1, 1, (2,)), y=spaces.Box(-1, 1, ()))))
    rows = torch.zeros(4, 2, *spec.shape, dtype=spec.dtype)
    for (t, n), (key, value) in {(0, 1): (1, torch.nan), (3, 0): (2, torch.inf)}.items():
        arrays = list(spec.unpack(rows[t, n]))
        arrays[key] = torch.full_like(arrays[key], value)
        rows[t, n] = spec.pack(arrays)
    assert (~spec.finite(rows)).nonzero().tolist() == [[0, 1], [3, 0]]
    rows[:] = 255  # a NaN in the floats; as pixels, any byte is fine
    assert not spec.finite(rows).any()
    assert ObsSpec(leaves_of(spaces.Dict(camera=CAMERA))).finite(torch.full((2, 37, 37, 1), 255)).all()


@pytest.mark.parametrize("n", [1, 3])
def test_rows_of_bytes_are_aligned_wherever_they_lie(n):
    spec = ObsSpec(leaves_of(spaces.Dict(camera=CAMERA, x=spaces.Box(-1, 1, (3,)))))
    assert (spec.dtype, spec.shape) == (torch.uint8, (12 + 1369 + 3,)), "numbers, image, and three bytes of filling"
    storage = spec.blank(4, n)
    for t in range(4):
        for i in range(n):
            one = spec.unpack(storage[t, i : i + 1])[1]
            assert torch.equal(one, torch.zeros(1, 3))


def test_a_single_key_is_stored_as_the_array_itself():
    spec = ObsSpec(leaves_of(spaces.Dict(camera=CAMERA, x=spaces.Box(-1, 1, (3,))), ["camera"]))
    assert (spec.is_single, spec.shape, spec.dtype) == (True, (37, 37, 1), torch.uint8)
    obs = {"camera": np.full((37, 37, 1), 7, np.uint8), "x": None}
    assert np.array_equal(spec.space.pack(obs), obs["camera"])
    assert spec.space.pack(obs) is not obs["camera"], "rows are new arrays"


def test_keys_choose_parts_by_name_index_and_path():
    space = spaces.Dict(
        eyes=spaces.Tuple((CAMERA, spaces.Dict(left=spaces.Discrete(2), right=spaces.Discrete(3)))),
        x=spaces.Box(-1, 1, (2,)),
    )

    def names(*keys, critic=()):
        return [(leaf.name, leaf.critic_only) for leaf in leaves_of(space, keys, critic)]

    everything = ["eyes/0", "eyes/1/left", "eyes/1/right", "x"]
    assert names() == [(name, False) for name in everything]
    assert names("eyes/1") == [("eyes/1/left", False), ("eyes/1/right", False)]
    assert names("x", "eyes/0") == [("eyes/0", False), ("x", False)], "in the order of the space"
    assert names("x", critic=["eyes/1/left"]) == [("x", False), ("eyes/1/left", True)]
    assert names(critic=["eyes"]) == [("x", False), *[(name, True) for name in everything[:3]]]
    assert [leaf.name for leaf in leaves_of(spaces.Tuple((CAMERA, CAMERA)), ["1"])] == ["1"]


def test_small_images_beside_other_arrays_are_vectors():
    small = spaces.Box(0, 255, (7, 7, 3), np.uint8)
    (codes, _) = leaves_of(spaces.Dict(image=small, x=spaces.Discrete(4)))
    assert (codes.kind, codes.divisor) == ("vector", 1)
    assert "is read as a vector, not scaled" in codes.note
    assert ObsLeaf.from_space(small).kind == "image"


def test_a_spec_is_read_as_another_one_of_the_same_arrays():
    low = spaces.Dict(a=spaces.Box(0, 7, (2,), np.uint8), b=spaces.Discrete(2))
    high = spaces.Dict(a=spaces.Box(0, 9, (2,), np.uint8), b=spaces.Discrete(2))
    mine, theirs = ObsSpec(leaves_of(low)), ObsSpec(leaves_of(high))
    assert mine.read_as(theirs) is theirs
    for other in (spaces.Dict(a=low["a"]), spaces.Dict(a=low["a"], b=spaces.Discrete(3))):
        assert mine.read_as(ObsSpec(leaves_of(other))) is mine


class Mission(spaces.Space):
    """A space of the user's own, as minigrid's mission text."""


UNSUPPORTED = {
    "Mission": Mission(),
    "Text": spaces.Text(5),
    "Graph": spaces.Graph(spaces.Box(0, 1, (2,)), None),
    "Sequence": spaces.Sequence(spaces.Discrete(2)),
    "OneOf": spaces.OneOf((spaces.Discrete(2), spaces.Discrete(3))),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_part_is_refused_by_its_key_unless_it_is_left_out(name):
    space = spaces.Dict(x=spaces.Discrete(2), deep=spaces.Tuple((UNSUPPORTED[name], spaces.Discrete(2))))
    with pytest.raises(EnvError, match=f"key deep/0 is {name}, which is not supported.*--obs-keys") as refused:
        leaves_of(space)
    assert "\n" not in str(refused.value)
    assert len(leaves_of(space, ["x"])) == 1
    assert len(leaves_of(space, ["x", "deep/1"])) == 2


BOX = spaces.Box(-1, 1, (2,))
AB = spaces.Dict(a=BOX, b=spaces.Discrete(2), camera=spaces.Dict(left=BOX))


@pytest.mark.parametrize(
    ("space", "keys", "critic", "error", "message"),
    [
        (AB, ["camera/lft"], [], ConfigError, "obs_keys: .* no 'camera/lft'; did you mean camera/left?"),
        (AB, [], ["zz"], ConfigError, "critic_obs_keys: .* no 'zz'; there are a, b, camera, camera/left."),
        (AB, ["a"], ["a"], ConfigError, "both name 'a'"),
        (AB, [], ["a", "b", "camera"], ConfigError, "critic_obs_keys a b camera leave the policy no observation"),
        (AB, ["camera/left"], ["camera"], ConfigError, "obs_keys name 'camera/left', a part of 'camera', which"),
        (BOX, ["a"], [], ConfigError, "obs_keys need observations with keys, but these are one Box"),
        (BOX, [], ["a"], ConfigError, "critic_obs_keys need observations with keys, but these are one Box"),
        (
            spaces.Dict(a=AB, c=BOX),
            ["a/b", "c"],
            ["a"],
            ConfigError,
            "obs_keys name 'a/b', a part of 'a', which critic_obs_keys keep",
        ),
        (spaces.Dict(), [], [], EnvError, "the observation space is empty"),
        (spaces.Tuple(()), [], [], EnvError, "the observation space is empty"),
        (spaces.Dict({"c/d": BOX, "c": spaces.Dict(d=BOX)}), [], [], EnvError, "two parts .* are called 'c/d'"),
        (spaces.Dict(a=BOX, b=spaces.Discrete(2, start=2**24)), [], [], EnvError, "observation b counts from 16,777"),
    ],
)
def test_wrong_keys_are_refused(space, keys, critic, error, message):
    with pytest.raises(error, match=message):
        leaves_of(space, keys, critic)


def test_the_mask_is_nothing_to_read():
    space = spaces.Dict(a=BOX, action_mask=spaces.MultiBinary(2))
    with pytest.raises(ConfigError, match="critic_obs_keys name 'action_mask', the mask"):
        leaves_of(space, critic_obs_keys=["action_mask"], mask=mask_leaf("key", 2))


def test_a_mask_alone_is_no_observation():
    space, mask = spaces.Dict(action_mask=spaces.MultiBinary(2)), mask_leaf("key", 2)
    with pytest.raises(EnvError, match="no observation but the mask action_mask"):
        leaves_of(space, mask=mask)


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        ({"a": np.zeros(2)}, "no 'b', which its space declares"),
        (np.zeros(2), "no 'a', which its space declares"),
        ({"a": np.zeros(3), "b": 0}, r"observation a has shape \(3,\); its space says float32 \(2,\)"),
        ({"a": ["x", "y"], "b": 0}, "observation a has dtype <U1"),
        ({"a": np.zeros(2), "b": 2}, r"observation b is 2, outside its space Discrete\(2\)"),
        ({"a": np.zeros(2), "b": None}, "observation b has dtype object"),
        ({"a": np.zeros(2), "b": 0.5}, "observation b has dtype float64; its space says int64"),
        ({"a": np.zeros(2), "b": np.nan}, "observation b has dtype float64"),
    ],
)
def test_observations_that_do_not_fit_their_space_are_refused(obs, message):
    packed = PackedSpace(leaves_of(AB, ["a", "b"]))
    with pytest.raises(EnvError, match=message):
        packed.pack(obs)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((37, 37, 1), 0.7), "observation camera has dtype float64; its space says uint8"),
        (np.full((37, 37, 1), 300), "observation camera has values from 300 to 300; its space is of uint8"),
        (np.full((37, 37, 1), -1), "observation camera has values from -1 to -1"),
    ],
)
def test_pixels_that_bytes_cannot_hold_are_refused(image, message):
    packed = PackedSpace(leaves_of(spaces.Dict(a=BOX, camera=CAMERA)))
    with pytest.raises(EnvError, match=message):
        packed.pack({"a": np.zeros(2), "camera": image})
    bits = image.astype(np.uint8)  # wider integers that fit
    assert np.array_equal(
        packed.pack({"a": np.zeros(2), "camera": bits.astype(np.int64)}),
        packed.pack({"a": np.zeros(2), "camera": bits}),
    )


def test_another_space_than_that_of_the_first_environment_is_refused():
    first, other = scene("none"), scene("none", camera=False)
    packed = packed_space(first, ["place"], [], None)
    PackObservation(first, packed)
    with pytest.raises(EnvError, match="its observation space is Dict.*, that of the first environment Dict"):
        PackObservation(other, packed)


def test_an_index_outside_names_the_environment():
    packed = PackedSpace(leaves_of(AB, ["a", "b"]))
    with pytest.raises(EnvError, match="observation b of environment 1 is -1, outside"):
        packed.pack({"a": np.zeros((2, 2)), "b": np.array([0, -1])}, n=2)


@pytest.mark.parametrize(
    "mask", [[1, 0, 1, 0, 1], ([1, 0, 1], [0, 1]), [[1, 0, 1], [0, 1]], (np.array([1, 0, 1]), np.array([False, True]))]
)
def test_components_of_a_mask_are_joined(mask):
    assert flat_mask(mask, 5).tolist() == [True, False, True, False, True]
    assert flat_mask([mask, mask], 5, 2).tolist() == 2 * [[True, False, True, False, True]]


@pytest.mark.parametrize(
    ("mask", "n"),
    [(np.ones(4), None), ([[1, 1], [1]], None), ("all", None), (None, None), (1, None), (np.ones((2, 5)), 3)],
)
def test_masks_of_another_size_are_refused(mask, n):
    with pytest.raises(EnvError, match=r"an action mask has shape .*; .* needs (3 x )?5 numbers or bools"):
        flat_mask(mask, 5, n)


def test_a_mask_under_a_key_must_fit_the_actions():
    assert [n_choices(x) for x in (spaces.Discrete(3), spaces.MultiDiscrete([[2, 3], [4, 5]]), BOX)] == [3, 14, 0]
    assert mask_under_key(spaces.MultiBinary(14), 14).mask_source == "key"
    for part in (spaces.MultiBinary(13), spaces.Text(14)):
        with pytest.raises(EnvError, match="needs a mask of 14 entries.*--action-masks off"):
            mask_under_key(part, 14)


@pytest.mark.parametrize("masks", ["key", "method", "info", "sometimes"])
@pytest.mark.parametrize("components", [1, 2])
def test_a_mask_is_found_wherever_an_environment_gives_it(masks, components):
    env = scene(masks, components=components)
    space = packed_space(env, ["place"], [], lambda: env.reset(seed=0)[1])
    source = "info" if masks == "sometimes" else masks
    assert (space.mask.mask_source, space.mask.size) == (source, sum(env.nvec))
    wrapped = PackObservation(env, space)
    for seed in (1, None):
        row, _ = wrapped.reset(seed=seed)
        assert np.array_equal(space.allowed(row), env.mask)
    assert packed_space(env, ["place"], [], None).mask is None, "masks are not wanted"


def test_an_environment_without_masks_has_none():
    env = scene("none")
    assert packed_space(env, [], [], lambda: env.reset(seed=0)[1]).mask is None


class Fails(type(scene("method"))):
    def action_masks(self):
        raise ZeroDivisionError("not today")


def test_a_method_that_fails_is_one_line():
    env = Fails("method")
    with pytest.raises(EnvError, match=r"Fails.action_masks\(\) failed: ZeroDivisionError: not today \(test_packing"):
        packed_space(env, [], [], lambda: env.reset(seed=0)[1])
