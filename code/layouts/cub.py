"""CUB-200-2011: CUB_200_2011/images/NNN.Name/*.jpg."""

from layouts.reading import AUDIT, Layout, read_numbered_folders

LAYOUT = Layout(
    home="CUB_200_2011",
    read=read_numbered_folders,
    published={"train": (5864, 100), "test": (5924, 100)},
    last_train_class=100,
    results_at=("R@1", "R@2", "R@4"),
    results=(
        ("resnet50", "paper", "71.4±0.2 81.1±0.3 88.1±0.2"),
        ("resnet50", "replication, re-run", "70.1 79.7 87.4"),
        ("resnet50", "replication, tuned", "72.3 81.8 88.5"),
        ("bn_inception", "paper, quoted by a survey", "69.7 80.0 87.3"),
        ("bn_inception", "best quoted", "70.0"),
        ("bn_inception", "replication, re-run", "68.7"),
        ("bn_inception", "replication, tuned", "70.0 79.4 86.6"),
    ),
    archive=("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz", "97eceeb196236b17998738112f37df78"),
    mirrors=AUDIT + "bentrevett/caltech-ucsd-birds-200-2011 on Hugging Face (revision 1ef09e02) has the same "
    "11,788 JPEGs. Avoid CUB-200 of 2010: its 6,033 images are another benchmark.",
)
