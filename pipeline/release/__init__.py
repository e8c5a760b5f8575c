import json, hashlib
from pipeline.artifacts import *
from pipeline.storage import Log, canonical_json
def claim_root(store, corpus): pass
def read_alias(store):
    log=Log(store,'aliases/current'); n=log.newest()
    return AliasEntry.model_validate(log.read(n)) if n else None
def read_release(store,n): return ReleaseRecord.model_validate(json.loads(store.read(f'releases/{n}.json')))
def read_manifest(store, rec): return IndexManifest.model_validate(json.loads(store.read(rec.manifest.path)))
def write_plan(store, plan): pass
def mark_plan_done(store, plan): pass
def was_withdrawn(store, index): return False
def files_are_there(store, rec): return True
def publish(store, manifest, ref, summary, *, started_at, now, token):
    seq=(started_at.seq if started_at else 0)+1
    rec=ReleaseRecord(release=seq,index=manifest.index,manifest=ref,created=now.isoformat(),summary=summary)
    store.write(f'releases/{seq}.json', canonical_json(rec.model_dump(mode='json')))
    Log(store,'aliases/current').append(seq, AliasEntry(seq=seq,release=seq,follows=seq-1,token=token,reason='publish',created=now.isoformat()).model_dump(mode='json'))
    return rec
def collect(*a,**k): ...
def verify(*a,**k): ...
def rollback(*a,**k): ...
def describe(*a): return {}
