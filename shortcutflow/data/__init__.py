"""The data sources a run can name: a closed set, told apart by ``kind``."""

from typing import Annotated

from pydantic import Field

from shortcutflow.data.digits import DigitsData
from shortcutflow.data.imagefolder import ImageFolderData
from shortcutflow.data.pusht import PushTData
from shortcutflow.data.source import ShardsData
from shortcutflow.data.webdataset import WebdatasetData

DataConfig = Annotated[
    DigitsData | ImageFolderData | PushTData | ShardsData | WebdatasetData, Field(discriminator="kind")
]
