# SPDX-License-Identifier: Apache-2.0
"""fvd.format.locator: what a superblock may say of where its base is; everything else is refused, for other programs are handed it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvd.errors import InvalidArgument
from fvd.format.locator import IMAGE_FORMATS, LOCATOR_BYTES_MAX, NBD_SCHEMES, QEMU_SCHEMES, BaseFormat, check_locator

pytestmark = pytest.mark.pure

GOOD = [
    ("/images/größe with, a=comma:and 'quotes'", BaseFormat.RAW),
    ("/dev/vg/golden", BaseFormat.QCOW2),
    ("nbd://host", BaseFormat.NBD),
    ("nbd://host:10809/export%20name", BaseFormat.NBD),
    ("nbd://[fe80::1]:10809/", BaseFormat.NBD),
    ("nbds://alice@host/x?tls-certificates=/etc/pki", BaseFormat.NBD),
    ("nbd+unix:///?socket=/run/x.sock", BaseFormat.NBD),
    ("nbds+unix://alice@/x?tls-psk-file=/a&socket=%2Frun%2Fx", BaseFormat.NBD),
    ("nbd+vsock://2:10809/x", BaseFormat.NBD),
    ("rbd:pool/image", BaseFormat.REMOTE_RAW),
    ("rbd:pool/space/image@snap:id=user:conf=/etc/ceph/other.conf", BaseFormat.VPC),
    ("ssh://user@host:22/images/a.vdi", BaseFormat.VDI),
    ("https://host/a/b.raw?x=y&z=(1)", BaseFormat.REMOTE_RAW),
    ("http://host/raw", BaseFormat.REMOTE_RAW),
    ("iscsi://host/iqn.2001-04.com.example:disk/1", BaseFormat.REMOTE_RAW),
    ("nfs://host/export/image", BaseFormat.VHDX),
]
BAD = [
    ("/path", BaseFormat.NONE),
    ("https://host/a.qcow2", BaseFormat.QCOW2),
    ("ssh://host/a.vmdk", BaseFormat.VMDK),
    ("ssh://host/a?host_key_check=no", BaseFormat.REMOTE_RAW),
    ("nfs://host/export/image?uid=0", BaseFormat.REMOTE_RAW),
    ("nbds://host/x?tls-verify-peer=false", BaseFormat.NBD),
    ("rbd:pool/image:conf=/home/eve/ceph.conf", BaseFormat.REMOTE_RAW),
    ("rbd:pool/image:conf=/etc/ceph/../../home/eve/ceph.conf", BaseFormat.REMOTE_RAW),
    ("", BaseFormat.RAW),
    ("relative/path", BaseFormat.RAW),
    ("../up", BaseFormat.QCOW2),
    ("-r", BaseFormat.RAW),
    ("/a\0b", BaseFormat.RAW),
    ("/a\nb", BaseFormat.RAW),
    ("/a\x7fb", BaseFormat.QCOW2),
    ("/a\x85b", BaseFormat.RAW),
    ("/\udcff", BaseFormat.RAW),
    ("/" + "ä" * (LOCATOR_BYTES_MAX // 2), BaseFormat.RAW),
    ('json:{"driver":"file","filename":"/etc/shadow"}', BaseFormat.QCOW2),
    ("json:{}", BaseFormat.REMOTE_RAW),
    ("fat:rw:/etc", BaseFormat.REMOTE_RAW),
    ("file:/etc/shadow", BaseFormat.REMOTE_RAW),
    ("file:///etc/shadow", BaseFormat.REMOTE_RAW),
    ("nbd:unix:/run/x", BaseFormat.NBD),
    ("nbd:host:10809", BaseFormat.NBD),
    ("blkdebug::/x", BaseFormat.REMOTE_RAW),
    ("fd:3", BaseFormat.REMOTE_RAW),
    ("null-co://", BaseFormat.REMOTE_RAW),
    ("exec:rm", BaseFormat.REMOTE_RAW),
    ("driver=qcow2,file.filename=/x", BaseFormat.QCOW2),
    ("HTTPS://host/x", BaseFormat.REMOTE_RAW),
    ("https:/host/x", BaseFormat.REMOTE_RAW),
    ("https:///x", BaseFormat.REMOTE_RAW),
    ("https://@/x", BaseFormat.REMOTE_RAW),
    ("https://host/a b", BaseFormat.REMOTE_RAW),
    ("https://host/a\\b", BaseFormat.REMOTE_RAW),
    ('https://host/a"b', BaseFormat.REMOTE_RAW),
    ("https://host/ä", BaseFormat.REMOTE_RAW),
    ("https://host/x#part", BaseFormat.REMOTE_RAW),
    ("https://host/x:readahead=1M:", BaseFormat.REMOTE_RAW),
    ("https://user:secret@host/x", BaseFormat.REMOTE_RAW),
    ("iscsi://user%secret@host/x", BaseFormat.REMOTE_RAW),
    ("nbd:///x", BaseFormat.NBD),
    ("nbd+unix://host/?socket=/x", BaseFormat.NBD),
    ("nbd+unix:///x", BaseFormat.NBD),
    ("nbd+unix:///?socket=relative", BaseFormat.NBD),
    ("nbd+unix:///?socket=/", BaseFormat.NBD),
    ("rbd:pool", BaseFormat.REMOTE_RAW),
    ("rbd:pool/image:key=AQ==", BaseFormat.REMOTE_RAW),
    ("rbd:pool/image:conf=relative", BaseFormat.REMOTE_RAW),
    ("rbd:pool/image:mon_host=evil", BaseFormat.REMOTE_RAW),
    ("rbd:pool/image\\:id=x", BaseFormat.REMOTE_RAW),
]


@pytest.mark.parametrize(("locator", "base_format"), GOOD)
def test_what_may_be_named(locator: str, base_format: BaseFormat) -> None:
    check_locator(locator, base_format)


@pytest.mark.parametrize(("locator", "base_format"), BAD, ids=[ascii(locator)[:40] for locator, _ in BAD])
def test_what_may_not(locator: str, base_format: BaseFormat) -> None:
    with pytest.raises(InvalidArgument):
        check_locator(locator, base_format)


@pytest.mark.parametrize("base_format", [f for f in BaseFormat if f is not BaseFormat.NONE], ids=lambda f: f.name)
def test_which_format_goes_with_what(base_format: BaseFormat) -> None:
    samples = {"/path": base_format is BaseFormat.RAW or base_format in IMAGE_FORMATS}
    samples["nbd://host"] = base_format is BaseFormat.NBD
    names_files = base_format in (BaseFormat.QCOW2, BaseFormat.QED, BaseFormat.VMDK)
    samples["ssh://host/x"] = base_format is BaseFormat.REMOTE_RAW or (base_format in IMAGE_FORMATS and not names_files)
    for locator, fine in samples.items():
        if fine:
            check_locator(locator, base_format)
        else:
            with pytest.raises(InvalidArgument):
                check_locator(locator, base_format)


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_locator("https://user:secret@host/x", BaseFormat.REMOTE_RAW)
    assert "secret" not in str(caught.value) and "host/x" in str(caught.value)


@given(
    st.text(st.sampled_from("ajnbdsrfilexjson0:/?@#%=&{}\"'\\,+.- \0\n\x85ä"), max_size=40), st.sampled_from([f for f in BaseFormat if f])
)
def test_whatever_is_taken_is_a_path_or_a_uri_that_is_known(locator: str, base_format: BaseFormat) -> None:
    try:
        check_locator(locator, base_format)
    except InvalidArgument:
        return
    assert locator.isprintable() or locator.startswith("/")
    assert not any(ord(letter) < 32 for letter in locator)
    assert locator.startswith("/") or locator.split(":")[0] in (*NBD_SCHEMES, *QEMU_SCHEMES)


def test_the_checks_are_no_assertions() -> None:
    """python -O keeps them."""
    code = f"""
from fvd.errors import InvalidArgument
from fvd.format.locator import BaseFormat, check_locator
for locator, number in {[(a, int(b)) for a, b in BAD]!r}:
    try:
        check_locator(locator, BaseFormat(number))
    except InvalidArgument:
        continue
    raise SystemExit(ascii(locator))
"""
    done = subprocess.run([sys.executable, "-O", "-"], input=code, text=True, check=False, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
