package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/uds"
	"ambient-emulator/internal/zds"
	"ambient-emulator/ztunnel-emulator/internal/inpod"
)

// snapshots is how the two processes fare when a ztunnel connects to an agent
// that has all the pods.
type snapshots struct {
	rounds []snapshotRound
	down   snapshotRound // one more, as `ip netns add` alone makes pods: with lo down
	idle   idleness
}

type snapshotRound struct {
	both    time.Duration // from the connection to the last ack, by the agent's own log
	start   time.Duration // from ztunnel's fork to its being ready, seen from outside
	agent   time.Duration // the same with a ztunnel that does nothing but ack
	ztunnel time.Duration // the same with an agent that does nothing but send

	agentAdded, ztunnelAdded usage // by all pods
}

// idleness is the time on the CPU while nothing happens, in ticks.
type idleness struct {
	over           time.Duration
	agent, ztunnel int
}

// measureSnapshots has fresh processes meet in every round. The node's network
// namespace, with ztunnel's fixed port, is this world's own: one at a time.
func measureSnapshots(ctx context.Context, o options, w *world) (snapshots, error) {
	var s snapshots
	for i := range o.loads {
		round := snapshotRound{}
		err := round.ztunnelAlone(ctx, o, w)
		if err == nil {
			last := i == o.loads-1
			err = s.meeting(ctx, o, w, w.podsDir(), &round, last)
		}
		if err != nil {
			return s, err
		}
		s.rounds = append(s.rounds, round)
	}
	// Where ztunnel looks for the name of a pod to warn of.
	const named = "/run/netns"
	if _, err := makePods(named, o.pods, false); err != nil {
		return s, err
	}
	return s, s.meeting(ctx, o, w, named, &s.down, false)
}

// ztunnelAlone plays the agent for a ztunnel-emulator.
func (r *snapshotRound) ztunnelAlone(ctx context.Context, o options, w *world) (err error) {
	l, err := uds.Listen(zds.Network, w.zdsSocket())
	if err != nil {
		return err
	}
	defer l.Close()
	z, err := startProcess(ctx, w, o.ztunnel, "--inpod-uds", w.zdsSocket())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, z.stop()) }()
	l.SetDeadline(time.Now().Add(sendTimeout))
	accepted, err := l.AcceptUnix()
	if err != nil {
		return err
	}
	conn := zds.NewConn(accepted)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(sendTimeout))
	if _, err := conn.ReadHello(); err != nil {
		return err
	}
	before, err := z.look()
	if err != nil {
		return err
	}

	start := time.Now()
	for i, path := range w.pods {
		if err := addPod(conn, path, i); err != nil {
			return err
		}
	}
	if err := ask(conn, zds.Snapshot(), fdpass.NoFD); err != nil {
		return err
	}
	r.ztunnel = time.Since(start)

	after, err := z.look()
	r.ztunnelAdded = after.minus(before)
	return err
}

func (u usage) minus(v usage) usage {
	return usage{files: u.files - v.files, resident: u.resident - v.resident}
}

func addPod(conn *zds.Conn, path string, number int) error {
	ns, err := netns.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	return ask(conn, addRequest(number), ns.FD())
}

func ask(conn *zds.Conn, req *zds.WorkloadRequest, fd int) error {
	if err := conn.SendRequest(req, fd); err != nil {
		return err
	}
	nack, err := conn.ReadResponse()
	if err == nil && nack != "" {
		err = errors.New(nack)
	}
	return err
}

// meeting gives a fresh agent all pods of a folder, and then a fresh ztunnel
// connects to it.
func (s *snapshots) meeting(ctx context.Context, o options, w *world, pods string, r *snapshotRound, last bool) (err error) {
	// The pods come at once when the watched folder does.
	watched := filepath.Join(w.dir, "watched")
	a, err := startProcess(ctx, w, o.cni, "serve", "--zds-uds", w.zdsSocket(), "--control-uds", filepath.Join(w.dir, "control.sock"), "--watch", watched)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.stop(), os.Remove(watched)) }()
	if _, err := a.await("listening for verbs"); err != nil {
		return err
	}
	before, err := a.look()
	if err != nil {
		return err
	}
	if err := os.Symlink(pods, watched); err != nil {
		return err
	}
	if err := awaitPods(ctx, o, w); err != nil {
		return err
	}
	time.Sleep(settleTime)

	started := time.Now()
	z, err := startProcess(ctx, w, o.ztunnel, "--inpod-uds", w.zdsSocket())
	if err != nil {
		return err
	}
	line, err := a.await("snapshot sent")
	r.start = time.Since(started)
	if err == nil {
		r.both, err = after(line)
	}
	if err == nil {
		err = ready(ctx)
	}
	if err == nil {
		var held usage
		held, err = a.look()
		held.files-- // the connection, which is no pod's
		r.agentAdded = held.minus(before)
	}
	if err == nil && last {
		s.idle, err = idle(ctx, o.idle, a, z)
	}
	if err := errors.Join(err, z.stop()); err != nil {
		return err
	}
	return r.agentAlone(ctx, w)
}

// awaitPods waits until the agent says that it has all pods.
func awaitPods(ctx context.Context, o options, w *world) error {
	var status struct{ Pods int }
	for range 500 {
		b, err := exec.CommandContext(ctx, o.cni, "status", "--json", "--control-uds", filepath.Join(w.dir, "control.sock")).Output()
		if err == nil {
			err = json.Unmarshal(b, &status)
		}
		if err != nil || status.Pods == len(w.pods) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("the agent has %d pods of %d", status.Pods, len(w.pods))
}

// after reads the duration in the agent's log line.
func after(line string) (time.Duration, error) {
	found := regexp.MustCompile(` after=(\S+)`).FindStringSubmatch(line)
	if found == nil {
		return 0, fmt.Errorf("no duration in the agent's line %q", line)
	}
	return time.ParseDuration(found[1])
}

// ready makes sure that ztunnel says so itself.
func ready(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/healthz/ready", inpod.ReadinessPort), nil)
	if err != nil {
		return err
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("all is acked, but ztunnel's readiness is %s", resp.Status)
	}
	return nil
}

// idle watches the two do nothing.
func idle(ctx context.Context, over time.Duration, agent, ztunnel *process) (idleness, error) {
	a, err1 := agent.ticks()
	z, err2 := ztunnel.ticks()
	select {
	case <-time.After(over):
	case <-ctx.Done():
	}
	a2, err3 := agent.ticks()
	z2, err4 := ztunnel.ticks()
	return idleness{over: over, agent: a2 - a, ztunnel: z2 - z}, errors.Join(ctx.Err(), err1, err2, err3, err4)
}

// agentAlone plays a ztunnel for the agent.
func (r *snapshotRound) agentAlone(ctx context.Context, w *world) error {
	start := time.Now()
	dialled, _, err := uds.Dial(ctx, zds.Network, w.zdsSocket())
	if err != nil {
		return err
	}
	conn := zds.NewConn(dialled)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(sendTimeout))
	if err := conn.SendHello(); err != nil {
		return err
	}
	for {
		req, fd, err := conn.ReadRequest()
		if err != nil {
			return err
		}
		if fd != fdpass.NoFD {
			unix.Close(fd)
		}
		if err := conn.Respond(""); err != nil {
			return err
		}
		if req.GetSnapshotSent() != nil {
			r.agent = time.Since(start)
			return nil
		}
	}
}
