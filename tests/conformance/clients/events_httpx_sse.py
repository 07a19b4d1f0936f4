"""Print the id and the data of each message of an event stream, with httpx-sse: `URL [LAST_ID]`."""

import os
import sys
import time

import httpx
from httpx_sse import connect_sse

url, last_id = (*sys.argv[1:], "")[:2]
wait = 1.0
with httpx.Client(timeout=60) as client:
    while True:
        headers = {"Authorization": f"Bearer {os.environ['CATBUS_TOKEN']}"}
        if last_id:
            headers["Last-Event-ID"] = last_id
        try:
            with connect_sse(client, "GET", url, headers=headers) as source:
                if 400 <= source.response.status_code < 429:
                    sys.exit(source.response.read().decode())
                for event in source.iter_sse():
                    # A block of `id` or of `retry` alone is an event without data here.
                    last_id, wait = event.id or last_id, (event.retry or wait * 1000) / 1000
                    if event.event == "message" and event.data:
                        print(last_id, event.data, flush=True)
        except httpx.TransportError:
            pass
        time.sleep(wait)
