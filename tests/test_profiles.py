import pytest
import torch

from userip.profiles import Profile


@pytest.mark.parametrize("options, expected", [
    ({"ratings": True, "route": ["title", "brand+rating"]}, [False, True]),
    ({"ratings": True, "route": ["none"]}, [True, True]),
    ({"ratings": False, "route": ["title", "brand"]}, [False, False]), ({}, [False, False])], ids=str)
def test_the_options_of_stage_2_say_which_profiles_read_ratings(options, expected):
    stored = {"names": ["a", "b"], "profiles": torch.zeros(1, 3, 2, 4), "num_evidence": torch.ones(1, 3, 2),
              "gain": torch.ones(3, 2), "noise": torch.zeros(2, 4, 4)}
    profiles = [Profile(stored, k, options, torch.ones(3).bool()) for k in range(2)]
    assert [profile.reads_ratings for profile in profiles] == expected
    assert [profile.num_codes for profile in profiles] == [8 if reads else size
                                                           for reads, size in zip(expected, (4, 3))]
