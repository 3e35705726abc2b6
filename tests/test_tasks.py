"""Images to tokens and back, splits, the order of data; Fashion-MNIST found, fetched or plainly refused."""

import gzip
import hashlib
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from projectable import storage, tasks
from projectable.config import get_profile
from projectable.storage import WriteError, locked
from projectable.tasks import Codebook, Images, TaskData, from_patches, images, make_tasks, split_images, to_patches
from projectable.tasks.images import DataError, load_digits, load_fashion_mnist, load_images

ARGUMENTS = dict(vocab_size=32, patch=2, val_per_class=20)


# ---------------------------------------------------------------------------------------------- patches and codes


def test_patches_are_in_raster_order():
    image = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    assert to_patches(image, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_and_back(channels):
    image = np.random.default_rng(0).random((5, 6, 9, channels), np.float32)
    patches = to_patches(image, 3)
    assert patches.shape == (5, 6, 9 * channels)
    assert np.array_equal(from_patches(patches, 3, 6, 9), image)


def test_a_patch_that_does_not_fit():
    with pytest.raises(ValueError, match="patch=3 does not divide images of 8×8 pixels; allowed: 1, 2, 4, 8$"):
        make_tasks("digits", patch=3)


def test_encoding_picks_the_nearest_code(digits):
    x, _ = load_digits().test
    patches = to_patches(x[:50], 2).astype(np.float64)
    distances = ((patches[:, :, None] - digits.codebook.codes) ** 2).sum(-1)  # (n, N, V)
    tokens = digits.codebook.encode(x[:50])
    chosen = np.take_along_axis(distances, tokens[..., None], -1)[..., 0]
    assert tokens.dtype == np.int64
    np.testing.assert_allclose(chosen, distances.min(-1), atol=1e-6)
    assert np.array_equal(digits.codebook.encode(x[:50], block=7), tokens)


def test_codes_are_distinct_sorted_by_brightness_and_stay_themselves(digits):
    codes = digits.codebook.codes
    assert len(np.unique(codes, axis=0)) == 32 and (np.diff(codes.mean(1)) >= 0).all()
    tokens = np.arange(32).reshape(2, 16)
    assert np.array_equal(digits.codebook.encode(digits.codebook.decode(tokens)), tokens)


def test_images_survive_the_codebook(digits):
    x, _ = load_digits().test
    book = digits.codebook
    error = np.mean((book.decode(book.encode(x)) - x) ** 2)
    assert book.psnr(x) == pytest.approx(-10 * np.log10(error), abs=1e-3)
    assert book.psnr(x) > 19  # 32 codes for 4 pixels; one code alone gives 8 dB
    bigger = Codebook.fit(x, 2, 128)
    assert bigger.psnr(x) > book.psnr(x) + 2


def test_a_codebook_larger_than_its_patches():
    with pytest.raises(ValueError, match="a codebook of 99 codes needs as many patches; these images have 16"):
        Codebook.fit(np.zeros((1, 8, 8, 1), np.float32), 2, 99)


# ------------------------------------------------------------------------------------------------ splits and tasks


def held_back():
    """Which of the digits' training images are validation images."""
    digits = load_digits()
    n = len(digits.train[1])
    numbers = np.arange(n).reshape(n, 1, 1, 1) / n  # one pixel each, which says which image it is
    numbered = Images(
        "", "", digits.label_names, (numbers, digits.train[1]), (digits.test[0][:, :1, :1], digits.test[1])
    )
    return np.rint(split_images(numbered, 20)["val"][0].flatten() * n).astype(int)


@pytest.mark.parametrize("size", [32, 64])
def test_threads_change_no_code(size):
    """Else a model would not fit the images it was made of where a script has more cores than a notebook."""
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(Codebook.fit(load_digits().train[0], 2, size).codes)
    assert np.array_equal(*found)


@pytest.mark.parametrize("definition", ["classes", "clusters4"])
def test_the_codebook_and_the_tasks_see_training_images_only(monkeypatch, definition):
    before = make_tasks("digits", definition, **ARGUMENTS)
    digits = load_digits()
    x, x_test, held = digits.train[0].copy(), digits.test[0][:, ::-1], held_back()
    x[held] = x[held, ::-1]  # upside down
    changed = Images("digits", "", digits.label_names, (x, digits.train[1]), (x_test, digits.test[1]))
    monkeypatch.setattr(tasks, "load_images", lambda name, patch: changed)
    after = make_tasks("digits", definition, **ARGUMENTS)
    assert np.array_equal(before.codebook.codes, after.codebook.codes)
    assert all(torch.equal(a, b) for a, b in zip(before.tokens["train"], after.tokens["train"], strict=True))
    for split in ("val", "test"):  # and the change did arrive
        flipped = [torch.cat(data.tokens[split]).sort(0).values for data in (before, after)]
        assert not torch.equal(*flipped)


def test_splits_are_disjoint_complete_balanced_and_always_the_same(digits):
    x, y = load_digits().train
    held = held_back()
    splits = split_images(load_digits(), 20)
    assert np.array_equal(splits["val"][0], x[held]) and len(np.unique(held)) == 200
    assert np.array_equal(splits["train"][0], np.delete(x, held, axis=0))
    assert np.bincount(splits["val"][1]).tolist() == [20] * 10
    again = make_tasks("digits", **ARGUMENTS)
    for split in tasks.SPLITS:
        assert all(torch.equal(a, b) for a, b in zip(digits.tokens[split], again.tokens[split], strict=True))


def test_classes_hold_the_images_of_their_class(digits):
    splits = split_images(load_digits(), 20)
    assert digits.task_names == tuple("0123456789")
    for split, (x, y) in splits.items():
        for task in range(10):
            expected = digits.codebook.encode(x[y == task])
            assert np.array_equal(digits.tokens[split][task].numpy(), expected)


def test_clusters_hold_every_image_once_and_similar_ones_together(digits):
    clusters = make_tasks("digits", "clusters4", **ARGUMENTS)
    assert clusters.task_names == ("cluster 0", "cluster 1", "cluster 2", "cluster 3")

    def spread(groups):  # mean squared distance of pixels to the group's mean
        xs = [clusters.codebook.decode(t.numpy()) for t in groups]
        return sum(((x - x.mean(0)) ** 2).sum() for x in xs) / sum(map(len, xs))

    for split in tasks.SPLITS:
        ours = torch.cat(clusters.tokens[split])
        assert torch.equal(ours.unique(dim=0), torch.cat(digits.tokens[split]).unique(dim=0))
        assert len(ours) == sum(map(len, digits.tokens[split]))
        assert spread(clusters.tokens[split]) < 0.9 * spread([ours])


def test_tasks_by_name_and_number(digits):
    data = two_tasks(digits, ("shirt", "bag"))
    assert [data.task_id(task) for task in ("bag", 1, "0", "shirt")] == [1, 1, 0, 0]
    for wrong in ("shoe", 2, -1):
        with pytest.raises(ValueError, match=r"unknown task .*; allowed: shirt, bag \(or 0 to 1\)"):
            data.task_id(wrong)


def test_a_number_is_no_name(digits):
    data = two_tasks(digits, ("1", "0"))
    assert [data.task_id(task) for task in ("1", 1, 0)] == [0, 1, 0]


def test_a_name_may_be_asked_for_with_its_accents_put_together_or_apart(digits):
    together, apart = "caf\u00e9", "cafe\u0301"
    for name in (together, apart):
        data = two_tasks(digits, ("tea", name))
        assert data.task_id(together) == data.task_id(apart) == 1
    assert two_tasks(digits, (together, apart)).task_id(apart) == 1  # the very name goes first


def two_tasks(digits, names: tuple[str, ...], **tokens) -> TaskData:
    """The first two of the digits under these names; `tokens` of a split in place of its own."""
    return TaskData("mine", names, {split: x[:2] for split, x in digits.tokens.items()} | tokens, digits.codebook)


def test_sequences_that_are_no_task_data_are_refused(digits):
    first, second = digits.tokens["val"][:2]
    with pytest.raises(ValueError, match="task_names of 'mine' are not all different"):
        two_tasks(digits, ("a", "a"))
    for names, tokens, said in (
        (("a",), {}, "train sequences of 2 tasks in 'mine'; allowed: 1"),
        (("a", "b"), dict(test=[first]), "test sequences of 1 tasks in 'mine'; allowed: 2"),
        (
            ("a", "b"),
            dict(val=[first, second.int()]),
            r"val sequences of 'mine' are \(.*, 16\), torch.int32; allowed: tens",
        ),
        (("a", "b"), dict(val=[first[:, :9], second]), r"val sequences of 'mine' are \(.*, 9\), torch.int64; allowed"),
        (("a", "b"), dict(val=[first, second.numpy()]), r"val .* are ndarray; allowed: tensors \(n, 16\), int64"),
    ):
        with pytest.raises(ValueError, match=said):
            two_tasks(digits, names, **tokens)


@pytest.mark.parametrize(
    "images, said",
    [
        (np.zeros((2, 8, 8, 1), np.uint8), r"images \(2, 8, 8, 1\), uint8; allowed: \(n, 8, 8, 1\), floats"),
        (np.zeros((2, 4, 16, 1)), r"images \(2, 4, 16, 1\), float64; allowed"),
        (np.full((2, 8, 8, 1), 16.0), "pixels from 16 to 16; allowed: 0 to 1"),
        (np.full((2, 8, 8, 1), np.nan), "pixels from nan to nan; allowed: 0 to 1"),
    ],
)
def test_images_that_a_codebook_was_not_made_for_are_refused(digits, images, said):
    with pytest.raises(ValueError, match=said):
        digits.codebook.encode(images)


@pytest.mark.parametrize("wrong", ["colours", "clusters", "clustersmany", "clusters-3"])
def test_unknown_tasks(wrong):
    with pytest.raises(ValueError, match=f"unknown tasks '{wrong}'; allowed: classes, clustersK"):
        make_tasks("digits", wrong, **ARGUMENTS)


def test_unknown_dataset():
    with pytest.raises(ValueError, match="unknown dataset 'cifar'; allowed: fashion, digits, .*, SVHN, folder:PATH$"):
        load_images("cifar")


def test_a_folder_without_its_prefix_is_told_how(tmp_path):
    with pytest.raises(ValueError, match=f"allowed: .* \\(your own images: folder:{tmp_path}\\)"):
        load_images(str(tmp_path))


@pytest.mark.parametrize("argument", ["vocab_size", "patch"])
def test_no_code_and_no_patch(argument):
    with pytest.raises(ValueError, match=f"{argument}=0; allowed: 1 or more"):
        make_tasks("digits", **ARGUMENTS | {argument: 0})


@pytest.mark.parametrize("dataset", ["glyphs", "text"])
def test_sets_whose_splits_follow_validation_need_some(dataset):
    with pytest.raises(ValueError, match="val_per_class=0; allowed: 1 or more"):
        make_tasks(dataset, val_per_class=0)


@pytest.mark.parametrize("n_clusters", [0, 1239])
def test_no_cluster_and_more_clusters_than_images(n_clusters):
    message = f"clusters{n_clusters} of 1238 training images; allowed: clusters1 to clusters1238"
    with pytest.raises(ValueError, match=message):
        make_tasks("digits", f"clusters{n_clusters}", **ARGUMENTS)


def test_a_task_without_images_of_a_split_is_named():
    words = "'cluster .*' of digits/clusters800 has no val images with val_per_class=.*: fewer tasks or more"
    with pytest.raises(ValueError, match=words):
        make_tasks("digits", "clusters800", **ARGUMENTS)


def test_a_quarter_of_a_class_is_held_back_at_most():
    many, n = split_images(load_digits(), 600), np.bincount(load_digits().train[1])
    assert np.bincount(many["val"][1]).tolist() == (n // 4).tolist()
    assert np.bincount(many["train"][1]).tolist() == (n - n // 4).tolist()


# --------------------------------------------------------------------------------------------- the order of data


def test_the_order_is_a_pure_function(digits):
    first = digits.draw(20, 10, 4, seed=3)
    np.random.seed(0)
    torch.manual_seed(0)
    again, other = digits.draw(20, 10, 4, seed=3), digits.draw(20, 10, 4, seed=4)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize("tasks_per_step", [3, 10, 99])
def test_every_image_comes_once_in_a_pass(digits, tasks_per_step):
    ids, index = digits.draw(400, tasks_per_step, 4, seed=0)
    assert ids.shape == (400, min(tasks_per_step, 10)) and index.shape == (*ids.shape, 4)
    for task in range(10):
        seen, n = index[ids == task].flatten(), len(digits.tokens["train"][task])
        assert len(seen) > 2 * n
        passes = [seen[i : i + n] for i in range(0, len(seen) - n + 1, n)]
        assert all(torch.equal(p.sort().values, torch.arange(n)) for p in passes)
        assert not torch.equal(passes[0], passes[1])


@pytest.mark.parametrize("tasks_per_step", [1, 4, 5, 7])
def test_tasks_take_turns(digits, tasks_per_step):
    ids, _ = digits.draw(100, tasks_per_step, 2, seed=0)
    for steps in range(1, 101):
        counts = torch.bincount(ids[:steps].flatten(), minlength=10)
        assert counts.max() - counts.min() <= 1 + (steps * tasks_per_step % 10 > 0)


def test_a_batch_holds_the_drawn_images(digits):
    ids, index = digits.draw(5, 3, 4, seed=0)
    batch = digits.batch(ids[2], index[2])
    assert batch.shape == (3, 4, 16) and batch.dtype == torch.int64
    assert torch.equal(batch[1, 3], digits.tokens["train"][ids[2, 1]][index[2, 1, 3]])


def test_the_first_images_of_every_task(digits):
    first = digits.first("test", 1000)
    assert first.shape == (10, 21, 16)  # digit 1 has 21 test images
    assert torch.equal(first[4], digits.tokens["test"][4][:21])


# ------------------------------------------------------------------------------------ Fashion-MNIST: found or not


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Four tiny IDX files in place of Fashion-MNIST, and two ways of getting them that do not work yet."""
    rng, source = np.random.default_rng(0), tmp_path / "elsewhere"
    source.mkdir()
    for name in images.FASHION_FILES:
        n = 30 if name.startswith("train") else 10
        if "images" in name:
            content = struct.pack(">BBBBIII", 0, 0, 8, 3, n, 28, 28) + rng.bytes(n * 784)
        else:
            content = struct.pack(">BBBBI", 0, 0, 8, 1, n) + bytes(i % 10 for i in range(n))
        (source / f"{name}.gz").write_bytes(gzip.compress(content))
        monkeypatch.setitem(images.FASHION_FILES, name, hashlib.sha256(content).hexdigest())
    data = tmp_path / "data"
    monkeypatch.setenv("PROJECTABLE_DATA", str(data))
    here = data / "FashionMNIST" / "raw"
    monkeypatch.setattr(images, "_fashion_folders", lambda: [here, tmp_path / "system"])
    calls = []

    def put(root):
        shutil.copytree(source, root / "FashionMNIST" / "raw", dirs_exist_ok=True)

    def offer(way, works):
        def download(root):
            calls.append(way)
            if not works:
                raise OSError(f"no {way} today")
            put(root)

        download.__name__ = f"_download_with_{way}"
        monkeypatch.setattr(images, download.__name__, download)

    real = images._download_with_torchvision
    offer("torchvision", False)
    offer("apt", False)
    ways = dict(offer=staticmethod(offer), put=put, real=staticmethod(real))
    return type("Fake", (), dict(source=source, here=here, data=data, calls=calls) | ways)


def test_fashion_mnist_on_disk_is_read_without_asking_anyone(fake):
    fake.put(fake.data)
    found = load_fashion_mnist()
    assert fake.calls == [] and found.name == "fashion"
    (x, y), (x_test, y_test) = found.train, found.test
    assert x.shape == (30, 28, 28, 1) and x.dtype == np.float32 and 0 <= x.min() and x.max() <= 1
    assert y.tolist() == [i % 10 for i in range(30)] and len(x_test) == len(y_test) == 10
    raw = gzip.decompress((fake.source / "train-images-idx3-ubyte.gz").read_bytes())
    assert x[0, 0, 1, 0] == np.float32(raw[17]) / np.float32(255)


def test_the_system_folder_counts_as_on_disk(fake, tmp_path):
    shutil.copytree(fake.source, tmp_path / "system")
    assert len(load_fashion_mnist().train[0]) == 30 and fake.calls == []


@pytest.mark.parametrize("torchvision, asked", [(True, ["torchvision"]), (False, ["torchvision", "apt"])])
def test_ways_to_fetch_are_tried_in_order(fake, torchvision, asked):
    fake.offer("torchvision", torchvision)
    fake.offer("apt", True)
    assert len(load_fashion_mnist().train[0]) == 30
    assert fake.calls == asked


def test_when_no_way_works_all_that_was_tried_is_said(fake):
    with pytest.raises(DataError) as error:
        make_tasks("fashion", **ARGUMENTS)
    message = str(error.value)
    assert fake.calls == ["torchvision", "apt"]
    for part in ("on disk", str(fake.here), "no torchvision today", "no apt today", "PROJECTABLE_DATA", ".gz"):
        assert part in message
    assert message.count("To get it") == 1 and "\n" not in message


@pytest.mark.parametrize("name", images.FASHION_FILES)
def test_a_missing_file_is_named(fake, name):
    fake.put(fake.data)
    (fake.here / f"{name}.gz").unlink()
    with pytest.raises(DataError, match=f"lacks {name}.gz"):
        load_fashion_mnist()


def test_a_deleted_archive_is_fetched_though_its_content_was_unpacked(fake, monkeypatch):
    """As the error of a damaged one says: delete it and fetch it again."""
    asked = []

    def retrieve(url, path):
        asked.append(url.rpartition("/")[2])
        shutil.copy(fake.source / asked[-1], path)

    known = [(f"{n}.gz", hashlib.md5((fake.source / f"{n}.gz").read_bytes()).hexdigest()) for n in images.FASHION_FILES]
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.resources", known)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", retrieve)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr(images, "_download_with_torchvision", fake.real)
    assert len(load_fashion_mnist().test[1]) == 10 and len(asked) == 4
    for name in images.FASHION_FILES:  # as torchvision leaves them
        (fake.here / name).write_bytes(gzip.decompress((fake.here / f"{name}.gz").read_bytes()))
    (fake.here / "t10k-labels-idx1-ubyte.gz").unlink()
    assert len(load_fashion_mnist().test[1]) == 10 and asked[4:] == ["t10k-labels-idx1-ubyte.gz"]


def test_what_another_process_is_fetching_is_waited_for(fake):
    """Files under their own names that are not whole yet: the other one holds the lock beside them."""
    fake.put(fake.data)
    whole = (fake.here / "t10k-labels-idx1-ubyte.gz").read_bytes()
    (fake.here / "t10k-labels-idx1-ubyte.gz").write_bytes(whole[:20])
    with ThreadPoolExecutor(1) as pool:
        with locked(fake.data / ".lock"):
            waiting = pool.submit(load_fashion_mnist)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
            (fake.here / "t10k-labels-idx1-ubyte.gz").write_bytes(whole)
        assert len(waiting.result(timeout=30).test[1]) == 10
    assert fake.calls == []


def test_a_folder_that_cannot_be_written_to_is_read_whatever_a_killed_download_left(fake, monkeypatch):
    fake.put(fake.data)
    (fake.data / ".lock").touch()

    def refuse(path):
        raise WriteError(f"{path} can't be written to")

    monkeypatch.setattr(storage, "_touch", refuse)
    assert len(load_fashion_mnist().test[1]) == 10 and fake.calls == []


DAMAGE = {
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "no archive": lambda content: b"<html>Not found</html>",
    "another byte": lambda content: content[:20] + bytes([content[20] ^ 4]) + content[21:],
    "other content": lambda content: gzip.compress(gzip.decompress(content)[::-1]),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_file_is_named_and_nothing_else_is_used(fake, name, damage):
    fake.put(fake.data)
    path = fake.here / f"{name}.gz"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(DataError) as error:
        make_tasks("fashion", **ARGUMENTS)
    message = str(error.value)
    assert f"{path} is damaged" in message and "Delete it and fetch it again" in message


def test_the_real_fashion_mnist(fashion):
    (x, y), (x_test, y_test) = fashion.train, fashion.test
    assert x.shape == (60_000, 28, 28, 1) and x_test.shape == (10_000, 28, 28, 1)
    assert np.bincount(y).tolist() == [6000] * 10 and np.bincount(y_test).tolist() == [1000] * 10
    trousers, bag = x[y == 1].mean(0), x[y == fashion.label_names.index("bag")].mean(0)
    assert trousers[2:26, 14, 0].mean() < bag[8:24, 14, 0].mean()  # the gap between two legs
    splits = split_images(fashion, 600)
    assert len(splits["train"][0]) == 54_000 and np.bincount(splits["val"][1]).tolist() == [600] * 10


def test_clusters_of_features_are_tasks_of_the_same_images(digits, monkeypatch):
    def encoder(images, **_):  # a stand-in; the real one is in test_features.py
        x = torch.as_tensor(images).flatten(1)
        return (x @ torch.randn(x.shape[1], 20, generator=torch.Generator().manual_seed(0))).abs()

    monkeypatch.setattr("projectable.tasks.images.image_features", encoder)
    monkeypatch.setattr(tasks, "_seen", tasks._seen.__wrapped__)
    featured = make_tasks("featured_digits", "clusters10", vocab_size=32, patch=2, val_per_class=20)
    assert featured.n_tasks == 10 and featured.name == "featured digits/clusters10"
    for split in tasks.SPLITS:  # every image is in one task, coded by the same codebook
        mine, theirs = (torch.cat(data.tokens[split]).tolist() for data in (featured, digits))
        assert sorted(mine) == sorted(theirs)
    pixels = make_tasks("digits", "clusters10", vocab_size=32, patch=2, val_per_class=20)
    sizes = [sorted(map(len, data.tokens["train"])) for data in (featured, pixels, digits)]
    assert len({tuple(s) for s in sizes}) == 3, "other tasks than those of pixels, and than the classes"
    with pytest.raises(ValueError, match="unknown tasks 'classes' of featured_digits; allowed: clustersK"):
        make_tasks("featured_digits", "classes", vocab_size=32, patch=2)
    for name in ("smoke", "laptop"):
        plain, other = get_profile(name).data, get_profile(name).featured.data
        assert replace(other, dataset=plain.dataset) == plain and other.dataset == f"featured_{plain.dataset}"
