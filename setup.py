"""All metadata is in pyproject.toml; here is what it cannot say: ds_configs/ travels inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["homodistil", "homodistil.*"]), "homodistil.ds_configs"],
    package_dir={"homodistil.ds_configs": "ds_configs"},
    package_data={
        "homodistil.config": ["recipes/*.yaml", "recipes/*/*.yaml", "student_sets/*/*.yaml"],
        "homodistil.ds_configs": ["*.json"],
    },
)
