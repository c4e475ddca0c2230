"""The planted world: users with a true hobby and background, items and interactions that reflect them."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
from sklearn.metrics import adjusted_rand_score

HOBBIES = {  # hobby -> its categories -> nouns of their titles; some nouns belong to several categories
    "gaming": {"Board Games": "Board Dice Cards Puzzle Box Guide",
               "Video Games": "Console Quest Racer Controller Box Guide",
               "Miniatures": "Dragon Knight Paint Figure Case Brush"},
    "cooking": {"Cookware": "Skillet Pot Pan Lid Set Stand",
                "Baking": "Mold Tray Whisk Flour Brush Book",
                "Knives": "Knife Blade Block Sharpener Set Case"},
    "outdoors": {"Hiking": "Boots Pack Poles Map Bag Guide",
                 "Cycling": "Pedal Helmet Saddle Pump Bag Light",
                 "Climbing": "Rope Harness Chalk Hook Shoes Bag"},
    "music": {"Guitars": "Guitar Strings Capo Strap Stand Case",
              "Vinyl": "Record Sleeve Needle Turntable Box Brush",
              "Keyboards": "Piano Synth Pedal Bench Stand Book"},
}
ADJECTIVES = (
    "Classic Modern Compact Deluxe Original Portable Vintage Essential Grand Little Silent Bright Rustic "
    "Sturdy Smooth Royal Simple Clever Golden Silver Urban Nordic Coastal Alpine").split()
SUFFIXES = "Kit Pack Edition Series Pro Plus Mini Max One Two Home Studio Travel Junior Duo Trio".split()
BRANDS = {  # background -> brands that lean to it
    "student": "Basik Frugo Plainly Thrifta Nofrills".split(),
    "family": "Hearthy Daywell Commono Kindred Oakline".split(),
    "executive": "Aurelio Vantagio Lumiere Regalis Monarque".split(),
}
PRICE_CENTRES = np.array([14.0, 42.0, 130.0])  # dollars, of each background
HOBBY_SHARES, BACKGROUND_SHARES = np.array([0.28, 0.26, 0.24, 0.22]), np.array([0.38, 0.34, 0.28])
HOBBY_PULL, BACKGROUND_PULL = 1.4, 1.6  # strength of truth in choices: keeps the Bayes ARI within 0.5 and 0.9
HOBBY_FIT, BACKGROUND_FIT = 0.85, 1.35  # strength of truth in ratings: the oracle gains at least .04 AUC
NUM_USERS, NUM_ITEMS = 2000, 600


def read_planted(args):
    """Interactions, items, and users with their true hobby and background, all drawn with args.seed."""
    world = _draw_world(args.seed)
    rng, hobby, background = world.rng, world.hobby, world.background
    chance = 1 - np.exp(-world.activity[:, None] * world.choice[hobby, background])  # [N, M]
    user, item = np.nonzero(rng.random(chance.shape) < chance)
    generosity = 0.35 * rng.standard_normal(NUM_USERS)
    quality = 0.35 * rng.standard_normal(NUM_ITEMS)
    opinion = 3.2 + world.fit[hobby[user], background[user], item] + generosity[user] + quality[item]
    opinion += 0.7 * rng.standard_normal(len(user))
    users = pd.DataFrame({"user_id": [f"U{index:05d}" for index in range(NUM_USERS)],
                          "true_hobby": np.array(list(HOBBIES))[hobby],
                          "true_background": np.array(list(BRANDS))[background]})
    interactions = pd.DataFrame({
        "user_id": users["user_id"].to_numpy()[user],
        "item_id": world.items["item_id"].to_numpy()[item],
        "rating": opinion.round().clip(1, 5),
        "timestamp": 1_600_000_000 + rng.integers(60_000_000, size=len(user)),
    })
    return interactions, world.items, users


def _draw_world(seed):
    """Items, what users are, p(item | hobby, background) and the fit of the item to both [4, 3, M]"""
    rng = np.random.default_rng([seed, 1])
    nouns = {category: words.split() for hobby in HOBBIES.values() for category, words in hobby.items()}
    categories = list(nouns)
    category = rng.integers(len(categories), size=NUM_ITEMS)
    level = rng.integers(3, size=NUM_ITEMS)  # the background whose prices the item has
    lean = np.where(rng.random(NUM_ITEMS) < 0.8, level, rng.integers(3, size=NUM_ITEMS))  # whose brands
    price = PRICE_CENTRES[level] * np.exp(0.45 * rng.standard_normal(NUM_ITEMS))
    brands = np.array(list(BRANDS.values()))  # [3, 5]
    items = pd.DataFrame({
        "item_id": [f"P{index:04d}" for index in range(NUM_ITEMS)],
        "title": [f"{rng.choice(ADJECTIVES)} {rng.choice(nouns[categories[c]])} {rng.choice(SUFFIXES)}"
                  for c in category],
        "category": np.array(categories)[category],
        "brand": brands[lean, rng.integers(brands.shape[1], size=NUM_ITEMS)],
        "price": price.round(2),
    })
    # a hobby likes its own three categories, each to a different degree, and other categories a little
    degree = 0.15 * rng.standard_normal((4, len(categories)))
    hobby_affinity = (degree + np.repeat(np.eye(4), 3, axis=1))[:, category]  # [4, M]
    price_affinity = np.exp(-0.5 * ((np.log(price) - np.log(PRICE_CENTRES)[:, None]) / 0.6) ** 2)
    background_affinity = 0.5 * (np.eye(3)[:, lean] + price_affinity)  # [3, M]
    hobby = rng.choice(4, size=NUM_USERS, p=HOBBY_SHARES)
    background = rng.choice(3, size=NUM_USERS, p=BACKGROUND_SHARES)
    popularity = np.exp(0.5 * rng.standard_normal(NUM_ITEMS))
    choice = popularity * np.exp(HOBBY_PULL * hobby_affinity[:, None] + BACKGROUND_PULL * background_affinity)
    choice /= choice.sum(-1, keepdims=True)  # [4, 3, M]
    activity = rng.gamma(6, 3.0, size=NUM_USERS)  # about 18 interactions per user
    fit = (HOBBY_FIT * (hobby_affinity - hobby_affinity.mean(0))[:, None]
           + BACKGROUND_FIT * (background_affinity - background_affinity.mean(0)))  # [4, 3, M]
    return SimpleNamespace(rng=rng, items=items, hobby=hobby, background=background, choice=choice, fit=fit,
                           activity=activity)


def bayes_ari(seed, table, items, users):
    """Adjusted Rand index per profile of the Bayes-optimal classifier, which knows this seed's world and sees
    the items of train and support rows, not their ratings: the best that profiles can reach.

    log p(h, b | seen items) = log prior + Σ_i log p(i seen or not | h, b), where an item is seen with
    probability share · (1 - exp(-activity p(i | h, b))); share: of the rows of cold users, or of all other
    users, the part that is seen.
    """
    world = _draw_world(seed)
    is_seen = table["split"].isin(["train", "support"])
    is_cold = table["user"].isin(table.loc[table["split"] == "support", "user"])
    world_user = users["user_id"].str[1:].astype(int).to_numpy()  # [N] stage 1's index -> the world's
    world_item = items["item_id"].str[1:].astype(int).to_numpy()
    user, item = world_user[table["user"]], world_item[table["item"]]
    share = np.full((NUM_USERS, 1), is_seen[~is_cold].mean())
    share[user[is_cold]] = is_seen[is_cold].mean()
    has_seen = np.zeros((NUM_USERS, NUM_ITEMS), dtype=bool)
    has_seen[user[is_seen], item[is_seen]] = True
    log_posterior = np.empty((NUM_USERS, 12))
    for cell, prior in enumerate(np.outer(HOBBY_SHARES, BACKGROUND_SHARES).ravel()):
        chance = share * -np.expm1(-world.activity[:, None] * world.choice.reshape(12, -1)[cell])  # [N, M]
        log_posterior[:, cell] = np.log(prior) + np.where(has_seen, np.log(chance), np.log1p(-chance)).sum(1)
    posterior = np.exp(log_posterior - log_posterior.max(1, keepdims=True)).reshape(-1, 4, 3)[world_user]
    return {"hobby": adjusted_rand_score(users["true_hobby"], posterior.sum(2).argmax(1)),
            "background": adjusted_rand_score(users["true_background"], posterior.sum(1).argmax(1))}
