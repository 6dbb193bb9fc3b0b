"""Each preset on a tiny file in the publisher's exact layout."""

import polars as pl
import pytest

from ksa_pipelines.config import presets
from recsys_ksa.cli import main
from recsys_ksa.data.dataset import open_dataset

LAYOUTS = {
    "movielens": ("ratings.csv", "userId,movieId,rating,timestamp\n1,307,3.5,1256677221\n2,481,3.5,1256677456\n"),
    "movielens-1m": ("ratings.dat", "1::1193::5::978300760\n1::661::3::978302109\n2::914::3::978301968\n"),
    "movielens-100k": ("u.data", "196\t242\t3\t881250949\n186\t302\t3\t891717742\n"),
    "amazon": (
        "Gift_Cards.jsonl",
        '{"rating": 5.0, "title": "Great", "text": "A \\"gift\\"", "images": [], "asin": "B00IX1I3G6", '
        '"parent_asin": "B00IX1I3G6", "user_id": "AHZ6XMOLEWA67S3TX7IWEXXGWSOA", "timestamp": 1549866158332, '
        '"helpful_vote": 0, "verified_purchase": true}\n'
        '{"rating": 1.0, "title": "No", "text": "n", "images": [], "asin": "B005ESMMWW", "parent_asin": "B005ESMMWW", '
        '"user_id": "AFZUK3MTBIBEDQOPAK3OATUOUKLA", "timestamp": 1599326840000, "helpful_vote": 0, '
        '"verified_purchase": true}\n',
    ),
    "amazon-2018": (
        "Appliances.csv",
        "1118461304,A3NHUQ33CFH3VM,5.0,1385510400\n1118461304,A3SK6VNBQDNBJE,5.0,1383264000\n",
    ),
    "kuairand": (
        "log_standard_4_08_to_4_21_pure.csv",
        "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
        "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
        "0,3649,20220408,1500,1649402247411,0,0,0,0,0,0,0,0,12466,0,0,0,0,1\n"
        "0,9598,20220408,1500,1649402247412,1,0,0,0,0,0,1,9999,9466,0,0,0,0,1\n",
    ),
    "taobao": ("UserBehavior.csv", "1,2268318,2520377,pv,1511544070\n1,2333346,2520771,buy,1511561733\n"),
    "retailrocket": (
        "events.csv",
        "timestamp,visitorid,event,itemid,transactionid\n1433221332117,257597,view,355908,\n"
        "1433224214164,992329,transaction,248676,4000\n",
    ),
    "rees46": (
        "2019-Oct.csv",
        "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session\n"
        "2019-10-01 00:00:00 UTC,view,44600062,2103807459595387724,,shiseido,35.79,541312140,72d76fde-8bb3\n"
        "2019-10-01 00:00:01 UTC,cart,3900821,2053013552326770905,appliances.water,,33.20,554748717,9333dfbd-b87a\n",
    ),
    "steam": (
        "recommendations.csv",
        "app_id,helpful,funny,date,is_recommended,hours,user_id,review_id\n"
        "975370,0,0,2022-12-12,true,36.3,51580,0\n304390,4,0,2017-02-17,false,11.5,2586,1\n",
    ),
    "online-retail": (
        "data.csv",
        "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
        '536365,85123A,"HEART, WHITE",6,12/1/2010 8:26,2.55,17850,United Kingdom\n'
        "536414,22139,,56,12/1/2010 11:52,0,,United Kingdom\n",
    ),
}
EXPECTED = {
    "movielens": [("1", "307", 1256677221), ("2", "481", 1256677456)],
    "movielens-1m": [("1", "1193", 978300760), ("1", "661", 978302109), ("2", "914", 978301968)],
    "movielens-100k": [("186", "302", 891717742), ("196", "242", 881250949)],
    "amazon": [
        ("AFZUK3MTBIBEDQOPAK3OATUOUKLA", "B005ESMMWW", 1599326840),
        ("AHZ6XMOLEWA67S3TX7IWEXXGWSOA", "B00IX1I3G6", 1549866158),
    ],
    "amazon-2018": [("A3NHUQ33CFH3VM", "1118461304", 1385510400), ("A3SK6VNBQDNBJE", "1118461304", 1383264000)],
    "kuairand": [("0", "3649", 1649402247), ("0", "9598", 1649402247)],
    "taobao": [("1", "2268318", 1511544070), ("1", "2333346", 1511561733)],
    "retailrocket": [("257597", "355908", 1433221332), ("992329", "248676", 1433224214)],
    "rees46": [("541312140", "44600062", 1569888000), ("554748717", "3900821", 1569888001)],
    "steam": [("2586", "304390", 1487289600), ("51580", "975370", 1670803200)],
    "online-retail": [("17850", "85123A", 1291191960)],
    "yambda": [("100", "7", 5), ("100", "9", 10)],
}
TYPES = {"taobao": ["buy", "pv"], "retailrocket": ["transaction", "view"], "rees46": ["cart", "view"]}


def test_each_preset_is_tested():
    assert set(EXPECTED) == set(presets())


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_preset_reads_the_publishers_layout(name, tmp_path):
    if name == "yambda":
        log = tmp_path / "listens.parquet"
        columns = {"uid": [100, 100], "timestamp": [5, 10], "item_id": [7, 9], "is_organic": [0, 1]}
        pl.DataFrame(columns | {"played_ratio_pct": [100, 5], "track_length_seconds": [180, 200]}).write_parquet(log)
    else:
        log = tmp_path / LAYOUTS[name][0]
        log.write_text(LAYOUTS[name][1])

    assert main(["prepare", str(log), "--out", str(tmp_path / "ds"), "--preset", name, "--num-buckets", "2"]) == 0

    dataset = open_dataset(tmp_path / "ds")
    histories = dataset.histories
    found = [
        (user, dataset.items.item_id[histories.item_index[row]], int(histories.timestamp[row]))
        for number, user in enumerate(histories.user_ids())
        for row in range(histories.offsets[number], histories.offsets[number + 1])
    ]
    assert sorted(found) == EXPECTED[name]
    assert dataset.vocab.get("event_type", [None])[1:] == TYPES.get(name, [])


def test_a_prepare_file_overrides_its_preset(tmp_path):
    (tmp_path / "u.data").write_text("1\t2\t3\t4\n")
    (tmp_path / "p.toml").write_text(
        'num_buckets = 3\n[read]\nheader = ["item_id", "user_id", "rating", "timestamp"]\n'
    )
    arguments = ["--preset", "movielens-100k", "--config", str(tmp_path / "p.toml")]
    assert main(["prepare", str(tmp_path / "u.data"), "--out", str(tmp_path / "ds"), *arguments]) == 0
    dataset = open_dataset(tmp_path / "ds")
    assert (dataset.histories.user_ids(), dataset.items.item_id, dataset.manifest.num_buckets) == (
        ["2"],
        [None, "1"],
        3,
    )


def test_an_unknown_preset_is_one_line(tmp_path, capsys):
    assert main(["prepare", "x.csv", "--out", str(tmp_path / "ds"), "--preset", "movielenz"]) == 2
    assert "expected one of amazon, " in capsys.readouterr().err
