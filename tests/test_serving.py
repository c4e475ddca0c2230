"""Table 6: a folded DCN is the DCN; what is held and how long it takes."""

from types import SimpleNamespace

import torch

from userip.ctr_models import MODELS
from userip.serving import FoldedDCN, serving_figures, serving_table


def test_a_folded_dcn_is_the_dcn_with_the_banks():
    torch.manual_seed(0)
    sizes = [7, 5, 4, 3, 6]  # users, items, two codes of users, one of items
    tables = [torch.randn(size, 8) for size in sizes]
    codes = torch.stack([torch.randint(size, (7,)) for size in sizes[2:4]], 1)
    item_codes = torch.randint(sizes[4], (5, 1))
    user, item = torch.arange(7).repeat(5), torch.arange(5).repeat_interleave(7)
    for used in (0, 1):  # without and with an item bank
        net = MODELS["dcn"](4 + used, 8, 3, [16, 16])
        for value in net.parameters():
            torch.nn.init.normal_(value, std=0.3)
        ids = [user, item, *codes[user].T, *item_codes[item, :used].T]
        folded = FoldedDCN(net, tables[:4 + used], codes, item_codes[:, :used])
        with torch.no_grad():
            expected = net(torch.stack([table[column] for table, column in zip(tables, ids)], 1))
            assert torch.allclose(folded(user, item), expected, atol=1e-3, rtol=1e-4)


def test_table_6_tells_what_is_held_and_how_long_it_takes():
    codes = torch.randint(3, (50, 2))
    rounds = (1, 20), (10_000, 10)
    args = SimpleNamespace(field_dim=8, layers=3, hidden=[16, 16])
    item_codes = torch.randint(8, (20, 1))
    figures = serving_figures(args, codes, item_codes, [4, 4, 8], torch.randn(50, 256), rounds)
    vectors = 50 * 256 * 4 / 2**20
    assert figures["DCN + vectors"]["megabytes"] - figures["DCN"]["megabytes"] > vectors
    assert figures["DCN + bank"]["megabytes"] - figures["DCN"]["megabytes"] < vectors / 2
    more = figures["DCN + taste"]["megabytes"] - figures["DCN"]["megabytes"]
    assert 70 * 64 * 4 / 2**20 < more < 70 * 64 * 4 / 2**20 + 0.01  # 64 numbers of each user and item
    assert all(row["p99_1"] >= row["median_1"] > row["median_10000"] > 0 for row in figures.values())
    assert len(serving_table(figures)) == 2 + 2 + len(figures)
