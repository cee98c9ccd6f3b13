import asyncio, signal
from dataclasses import replace
from tests.conftest import *
from tests.peers import *
from tests.rows import paid
from tests.support import *
from tests.test_relay_kills import relaying, with_environment

async def test_a(relaying, books, peers, telling, door):
    await paid(telling, *range(1,9))
    for d in Destination: peers.behaviour[d]=lambda _: Reply(after_seconds=0.2)
    async with door.opened() as url:
        cl=with_environment(relaying, DATABASE_URL=url, ECI_PAY_RELAY_CONCURRENCY="1", ECI_PAY_DATABASE_POOL_TIMEOUT_SECONDS="1")
        p=await cl.start("relay","--once")
        async def some(): return len(peers.accepted())>=2
        await until(some)
        door.shut()
        o,e=await p.communicate()
        print("EXIT",p.returncode); print(o.decode()); print(e.decode())

async def test_b(relaying, books, peers, telling):
    await paid(telling, *range(1,41))
    await peers.shut(Destination.ORDER)
    r=await relaying.run("relay","--once")
    print(r.exit_code, r.stdout, r.stderr)
    print(await books.rows("select destination, attempts, count(*), count(delivered_at) d, count(lease_id) l, max(last_error) from outbox group by 1,2"))
    r=await relaying.run("relay","--once")
    print(r.exit_code, r.stdout, r.stderr)

async def test_c(relaying, books, peers, telling):
    await paid(telling, *range(1,41))
    for d in Destination: peers.behaviour[d]=lambda _: Reply(after_seconds=0.2)
    for sig in (signal.SIGTERM, signal.SIGINT):
        n=len(peers.taken)
        p=await with_environment(relaying, ECI_PAY_RELAY_CONCURRENCY="2").start("relay")
        async def some(): return len(peers.taken)>=n+10
        await until(some)
        p.send_signal(sig)
        o,e=await p.communicate()
        print(p.returncode, o, e.decode())
    p=await with_environment(relaying, ECI_PAY_RELAY_CONCURRENCY="2").start("relay", "--once")
    async def some(): return len(peers.taken)>=n+14
    await until(some)
    p.send_signal(sig)
    o,e=await p.communicate()
    print(p.returncode, o, e.decode())
    print(await books.rows("select destination, attempts, count(*), count(delivered_at) d, count(lease_id) l, max(last_error) from outbox group by 1,2"))
    p=await with_environment(relaying, ECI_PAY_RELAY_CONCURRENCY="2").start("relay", "--once")
    n=len(peers.taken)
    async def some(): return len(peers.taken)>=n+4
    await until(some)
    p.send_signal(signal.SIGTERM)
    o,e=await p.communicate()
    print(p.returncode, o, e.decode())
    print(await books.rows("select destination, attempts, count(*), count(delivered_at) d, count(lease_id) l, max(last_error) from outbox group by 1,2"))
