"""The data sources that a run can name by their ``kind``: these, and those of installed packages."""

from typing import Annotated

from pydantic import SerializeAsAny

from shortcutflow.data.digits import DigitsData
from shortcutflow.data.imagefolder import ImageFolderData
from shortcutflow.data.source import DataSource, ShardsData
from shortcutflow.data.webdataset import WebdatasetData
from shortcutflow.plugins import Kinds

__all__ = ["DATA_SOURCES", "DataConfig", "DigitsData", "ImageFolderData", "ShardsData", "WebdatasetData"]

DATA_SOURCES = Kinds("data source", "shortcutflow.data", DataSource)
DataConfig = Annotated[SerializeAsAny[DataSource], DATA_SOURCES]
