"""Readers of traces: each format on a small file, and on the real one where it is present."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from llmos.kernel.errors import BadArgument, BadInput, NoSuchThing
from llmos.kernel.process import Class
from llmos.kernel.sim.jobs import in_order
from llmos.kernel.sim.traces.detect import read_trace
from llmos.kernel.sim.traces.jitter import read_jitter
from llmos.kernel.sim.traces.source import ReadOptions
from support.shared import shared

PHILLY = """timestamp,duration,num_gpus,gpu_time,cluster
2017-10-09 07:01:55,66.0,1,66.0,aa
2017-10-09 07:00:55,10.0,4,40.0,aa
2017-10-09 07:01:00,0,1,0,aa
2017-10-09 07:01:00,5,1,5,bb
"""
OPTIONS = ReadOptions()


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


def test_philly(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv.gz", PHILLY)
    trace = read_trace(path, ReadOptions(cluster="aa"))
    assert trace.kind == "philly"
    assert dict(trace.left_out) == {"never ran": 1}
    jobs = in_order(trace.jobs)
    assert [(j.submit_s, j.duration_s, j.devices) for j in jobs] == [(0, 10, 4), (60, 66, 1)]
    with pytest.raises(NoSuchThing, match="no cluster 'cc'"):
        read_trace(path, ReadOptions(cluster="cc"))


def test_gavel_needs_throughputs(tmp_path: Path) -> None:
    row = "LM (batch size 5)\tcmd\t-n\t1\t1000\t7.5\t2\n"
    path = write(tmp_path, "a.trace", row)
    with pytest.raises(BadInput, match="says not how long"):
        read_trace(path, OPTIONS)
    table = '{"v100": {"(\'LM (batch size 5)\', 2)": {"null": 4.0}}}'
    write(tmp_path, "simulation_throughputs.json.gz", table)
    job = read_trace(path, OPTIONS).jobs[0]
    assert (job.submit_s, job.duration_s, job.devices) == (7.5, 250.0, 2)
    with pytest.raises(NoSuchThing, match="no GPU 'x'"):
        read_trace(path, ReadOptions(gpu="x"))


def test_shockwave_and_tiresias(tmp_path: Path) -> None:
    row = "LM\tc\td\t-n\t1\t100\t2\tgns\t1\t-1\t50\t3\n"
    job = read_trace(write(tmp_path, "s", row), OPTIONS).jobs[0]
    assert (job.submit_s, job.duration_s, job.devices, job.step_s) == (3, 50, 2, 0.5)
    text = "job_id,num_gpu,submit_time,iterations,model_name,duration,interval\n0,8,4,1,vgg,9,3\n"
    job = read_trace(write(tmp_path, "t.csv", text), OPTIONS).jobs[0]
    assert (job.submit_s, job.duration_s, job.devices, job.program) == (4, 9, 8, "vgg")


def test_openb_shares_a_device(tmp_path: Path) -> None:
    head = "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,"
    text = f"{head}creation_time,deletion_time,scheduled_time\np,1,1,1,460,,LS,Running,5,105,5\n"
    job = read_trace(write(tmp_path, "o.csv", text), OPTIONS).jobs[0]
    assert job.memory_share == pytest.approx(0.46)
    assert job.duration_s == pytest.approx(46)
    assert job.cls is Class.INTERACTIVE


def test_pollux_reads_its_profiles(tmp_path: Path) -> None:
    text = "name,time,application,num_replicas,batch_size\nncf-0,7,ncf,1,100\n"
    path = write(tmp_path, "w.csv", text)
    with pytest.raises(BadInput, match="no job"):
        read_trace(path, OPTIONS)
    write(tmp_path, "profile_ncf_placements.csv",
          "placement,local_bsz,step_time,sync_time\n1,50,0.1,0\n1,150,0.3,0\n")  # fmt: skip
    write(tmp_path, "profile_ncf_scalability.csv",
          "num_nodes,num_replicas,local_bsz,step_time,sync_time\n")  # fmt: skip
    job = read_trace(path, OPTIONS).jobs[0]
    assert job.step_s == pytest.approx(0.2)
    assert job.duration_s == pytest.approx(50_000_000 / 100 * 0.2)


def test_requests(tmp_path: Path) -> None:
    rates = ReadOptions(prefill_rate=1000, decode_rate=100, kv_bytes=10)
    azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,500,50\n"
    job = read_trace(write(tmp_path, "a.csv", azure), rates).jobs[0]
    assert (job.duration_s, job.memory_bytes, job.cls) == (1.0, 5500, Class.INTERACTIVE)
    line = '{"timestamp": 2500, "input_length": 500, "output_length": 50, "hash_ids": [0]}\n'
    job = read_trace(write(tmp_path, "m.jsonl", line), rates).jobs[0]
    assert (job.submit_s, job.duration_s) == (2.5, 1.0)
    vidur = (
        "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n" + "500,50,550,10\n" * 2
    )
    jobs = read_trace(write(tmp_path, "v.csv", vidur), rates).jobs
    assert 0 < jobs[0].submit_s < jobs[1].submit_s


@pytest.mark.slow
def test_servegen_keeps_its_rates(tmp_path: Path) -> None:
    rates = "client,t_s,rate_rps,cv,family,p1,p2\n3,0,5,1,Gamma,0.5,9\n3,600,5,1,Weibull,0.7,9\n"
    path = write(tmp_path, "x_rates.csv", rates)
    with pytest.raises(BadInput, match="no token counts"):
        read_trace(path, OPTIONS)
    tokens = "client,t_s,field,mean,p10,p50,p90,p99\n"
    tokens += "3,0,input_tokens,1,10,20,30,40\n3,0,output_tokens,1,10,20,30,40\n"
    write(tmp_path, "x_tokens.csv", tokens)
    jobs = read_trace(path, OPTIONS).jobs
    assert len(jobs) == pytest.approx(6000, rel=0.1)
    assert jobs == read_trace(path, OPTIONS).jobs  # the same seed, the same requests
    assert jobs != read_trace(path, ReadOptions(seed=1)).jobs


def test_ones_own_csv(tmp_path: Path) -> None:
    text = "submit_s,duration_s,devices,memory,class,nice,user\n"
    text += "1,2,,4GiB,interactive,-5,ann\n3,4,2,,,,\n"
    a, b = read_trace(write(tmp_path, "mine.csv", text), OPTIONS).jobs
    assert (a.memory_bytes, a.cls, a.nice, a.user, a.devices) == (4 << 30, 0, -5, "ann", 1)
    assert (b.memory_bytes, b.cls, b.nice, b.devices) == (0, Class.BATCH, 0, 2)
    with pytest.raises(BadArgument, match="a column 'durations_s'"):
        read_trace(write(tmp_path, "typo.csv", "submit_s,duration_s,durations_s\n1,2,3\n"), OPTIONS)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("x,2", "submit_s is 'x', not a number"),
        ("1,", "duration_s is missing"),
        ("1,0", "duration_s is 0"),
        ("-1,2", "submit_s is -1, below 0"),
        ("nan,2", "submit_s is nan"),
        ("1,2,1.5", "devices is 1.5, not a whole number"),
        ("1,2,1,many", "memory: 'many' is not a size"),
    ],
)
def test_a_broken_row_is_named_and_the_rest_is_used(tmp_path: Path, row: str, why: str) -> None:
    path = write(tmp_path, "m.csv", f"submit_s,duration_s,devices,memory\n1,2\n{row}\n3,4\n")
    trace = read_trace(path, OPTIONS)
    assert len(trace.jobs) == 2
    assert [(b.line, b.why) for b in trace.broken] == [(3, why)]


@pytest.mark.parametrize("text", ["", "hello\n", "a,b\n1,2\n", "\x00\xff", '{"a": 1}\n'])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadInput):
        read_trace(write(tmp_path, "f", text), OPTIONS)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.csv.gz"
    path.write_bytes(gzip.compress(PHILLY.encode())[:-12])
    with pytest.raises(BadInput, match="damaged"):
        read_trace(str(path), OPTIONS)


def test_jitter(tmp_path: Path) -> None:
    text = ",worker,gpu,time,batch_time_norm\n0,0,25,1,100\n1,1,25,1,300\n"
    path = write(tmp_path, "j.csv", text)
    jitter = read_jitter(path, 0)
    assert jitter.slowdown(1) == 1
    assert jitter.slowdown(2) == pytest.approx(1.25, abs=0.03)  # 3/4 of the pairs have the slow one
    with pytest.raises(BadInput, match="give it with --jitter"):
        read_trace(path, OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "jobs"),
    [
        ("tiresias/60_job.csv.gz", 60),
        ("shockwave/120_0.2_5_100.trace.gz", 120),
        ("gavel/msr_seed0_ed69ec.trace.gz", 951),
        ("pollux/workload-1.csv", 160),
        ("alibaba_openb_2023/openb_pod_list_default.csv.gz", 6203),
        ("azure_llm_2023/AzureLLMInferenceTrace_code.csv.gz", 8819),
        ("mooncake_fast25/synthetic_trace.jsonl.gz", 3993),
        ("vidur/arxiv_summarization_llama2.csv.gz", 28257),
        ("servegen/deepseek-r1_rates.csv.gz", 20000),
    ],
)
def test_the_real_traces(name: str, jobs: int) -> None:
    trace = read_trace(str(shared("traces") / name), OPTIONS)
    assert (len(trace.jobs), trace.broken) == (jobs, [])
