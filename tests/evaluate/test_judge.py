"""What the judge gives of pictures: features once for each shared file, distances prompt by prompt, likeness."""

from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageDraw

from dbtrain.evaluate.distances import Distance
from dbtrain.evaluate.judge import Seen, likeness, load_judge, read_images
from tests.kit.main_job import photo


@pytest.fixture
def files(tmp_path):
    """Four pictures on disk."""
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for number, file in enumerate(files):
        photo(number, 64, 64).save(file)
    return files


def test_features_are_those_of_the_files(files):
    judge = load_judge(distance="patches")
    texts = ["a photo of a dog"] * 3
    drawn = Seen(files[:3], torch.tensor([0, 1, 1]), texts)
    features = judge.features(read_images(files[2:]), drawn, files[:1])
    assert torch.equal(features.real_identity_MD, judge.identity.images(read_images(files[2:])))
    assert torch.equal(features.generated_clip_ND, judge.pair.images(read_images(files[:3])))
    assert torch.equal(features.texts_without_identifier_ND, judge.pair.texts(texts))
    assert features.texts_with_identifier_ND.numel() == 0  # the base is given no identifier
    assert len(features.class_identity_PD) == 1
    assert features.pair_prompt.tolist() == [1] and features.distance_pairs.shape == (1,)


def test_distances_are_of_pictures_of_one_prompt(files):
    apart = Distance("first bytes", lambda images: torch.tensor([len(images)] * (len(images) - 1)).double())
    judge = replace(load_judge(distance="patches"), distance=apart)
    drawn = Seen(files, torch.tensor([5, 2, 5, 5]), ["a dog"] * 4)
    features = judge.features(read_images(files[:1]), drawn, [])
    assert features.distance_pairs.tolist() == [3, 3] and features.pair_prompt.tolist() == [5, 5]
    assert judge.names == {"identity": "embedded/identity", "clip": "embedded/clip", "distance": "first bytes"}


def test_shared_pictures_are_encoded_once(files):
    judge = load_judge(distance="patches")
    drawn = Seen(files[:2], torch.tensor([0, 1]), ["a dog"] * 2)
    first = judge.features(read_images(files[3:]), drawn, files[2:3], keep=True)
    kept = dict(judge.kept)
    assert {file for _, file in kept} == set(files[:3])
    again = judge.features(read_images(files[3:]), drawn, files[2:3], keep=True)
    assert all(judge.kept[key] is kept[key] for key in kept) and len(judge.kept) == len(kept)
    assert torch.equal(first.generated_identity_ND, again.generated_identity_ND)
    judge.features(read_images(files[3:]), Seen(files[3:], torch.tensor([0]), ["a dog"]), [])
    assert len(judge.kept) == len(kept)  # a subject's own pictures are not kept


def test_likeness_is_one_for_the_same_picture_at_any_size_and_low_for_others():
    pictures = [photo(1, 64, 64), photo(2, 64, 64)]
    big = [picture.resize((256, 256), Image.Resampling.NEAREST) for picture in pictures]
    same = likeness(pictures, big)
    assert same.diagonal().tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
    # Small pictures in one tone have no pattern to be alike in.
    assert likeness(pictures, [Image.new("RGB", (9, 9), "red").convert("L")]).abs().max() < 1e-9
    assert likeness([], pictures).shape == (0, 2)


def test_a_moved_subject_is_no_copy():
    def scene(left):
        image = Image.new("RGB", (64, 64), (200, 220, 240))
        ImageDraw.Draw(image).ellipse((left, 20, left + 30, 50), fill=(120, 60, 20))
        return image

    found = likeness([scene(4), scene(30)], [scene(4)])
    assert found[0, 0] == pytest.approx(1, abs=1e-9) and found[1, 0] < 0.5
