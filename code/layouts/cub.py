"""CUB-200-2011: CUB_200_2011/images/NNN.Name/*.jpg."""

from layouts.reading import AUDIT, Layout, read_numbered_folders

LAYOUT = Layout(
    home="CUB_200_2011",
    read=read_numbered_folders,
    published={"train": (5864, 100), "test": (5924, 100)},
    last_train_class=100,
    archive=("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz", "97eceeb196236b17998738112f37df78"),
    mirrors=AUDIT + "bentrevett/caltech-ucsd-birds-200-2011 on Hugging Face (revision 1ef09e02) has the same "
    "11,788 JPEGs. Avoid CUB-200 of 2010: its 6,033 images are another benchmark.",
)
