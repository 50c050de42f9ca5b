package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"

	"ambient-emulator/internal/handoff"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/uds"
	"ambient-emulator/ztunnel-emulator/internal/accesslog"
	"ambient-emulator/ztunnel-emulator/internal/inpod"
)

// handoffs is what handing over costs inside one process, over real sockets.
type handoffs struct {
	floor trial // (a) bare system calls
	seed  costs // (b) and (c), on the seed's wire
	zds   costs // (e) and (f), on the real one
}

// costs is what one way to hand over costs.
type costs struct {
	alone trial // ztunnel's side, from the descriptor received to the answer written
	whole trial // the other side, from its write to the answer
}

// way is a way to hand over: a receiver, and how to give it the namespace at
// path.
type way interface {
	handOver(path string) (whole, alone time.Duration, err error)
	stop() error
}

// measureHandoffs hands over every pod in every round, in either way, to fresh
// receivers each round, and between them has the floor visit as many namespaces
// of its own.
func measureHandoffs(ctx context.Context, w *world, rounds, turns int) (handoffs, error) {
	var h handoffs
	for range rounds {
		runtime.GC() // the last round's garbage is not this one's
		if err := h.round(ctx, w, turns); err != nil {
			return h, err
		}
	}
	return h, nil
}

func (h *handoffs) round(ctx context.Context, w *world, turns int) error {
	seed, err := startSeed(w.socket())
	if err != nil {
		return err
	}
	zds, err := startZDS(w.zdsSocket())
	if err != nil {
		return errors.Join(err, seed.stop())
	}
	f := newFloor()
	racers := []*racer{{way: seed, paths: w.pods, costs: &h.seed}, {way: zds, paths: w.zds, costs: &h.zds}}
	var floorTimes samples
	for i := 0; i < len(w.floor) && err == nil; i += turns {
		if err = ctx.Err(); err != nil {
			break
		}
		end := min(i+turns, len(w.floor))
		var took samples
		if took, err = f.visit(w.floor[i:end]); err != nil {
			break
		}
		floorTimes = append(floorTimes, took...)
		for _, r := range racers {
			err = errors.Join(err, r.run(i, end))
		}
	}
	f.close()
	if err := errors.Join(err, seed.stop(), zds.stop()); err != nil {
		return err
	}
	h.floor.add(floorTimes)
	for _, r := range racers {
		r.costs.alone.add(r.alone)
		r.costs.whole.add(r.whole)
	}
	return nil
}

// racer is one way in one round.
type racer struct {
	way
	paths        []string
	costs        *costs
	alone, whole samples
}

// run hands over the paths from begin to end.
func (r *racer) run(begin, end int) error {
	for _, path := range r.paths[begin:end] {
		whole, alone, err := r.handOver(path)
		if err != nil {
			return err
		}
		r.whole = append(r.whole, whole)
		r.alone = append(r.alone, alone)
	}
	return nil
}

// seedInside is a receiver on the seed's wire in this process, as
// ztunnel-emulator's command line makes one.
type seedInside struct {
	pods     *inpod.Pods
	listener *uds.Listener
	cancel   context.CancelFunc
	served   chan error
	reports  chan inpod.Handoff
	null     *os.File
}

func startSeed(socket string) (way, error) {
	log := accesslog.New(io.Discard, accesslog.Options{})
	pods, err := inpod.NewPods(log)
	if err != nil {
		return nil, err
	}
	l, err := uds.Listen("unix", socket)
	if err != nil {
		return nil, errors.Join(err, pods.Close())
	}
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return nil, errors.Join(err, l.Close(), pods.Close())
	}
	r := &seedInside{pods: pods, listener: l, served: make(chan error, 1), reports: make(chan inpod.Handoff, 1), null: null}
	server := &inpod.Server{
		Pods:   pods,
		Log:    log,
		Ready:  func() { fmt.Fprintln(null, "listeners ready") },
		Report: func(h inpod.Handoff) { r.reports <- h },
	}
	var ctx context.Context
	ctx, r.cancel = context.WithCancel(context.Background())
	go func() { r.served <- server.Serve(ctx, l) }()
	return r, nil
}

func (r *seedInside) stop() error {
	r.cancel()
	return errors.Join(<-r.served, r.listener.Close(), r.pods.Close(), r.null.Close())
}

// handOver hands over the namespace at path, and returns what the sender and
// what the receiver measured.
func (r *seedInside) handOver(path string) (whole, alone time.Duration, err error) {
	whole, err = send(r.listener.Path(), path)
	if err != nil {
		return 0, 0, err
	}
	h := <-r.reports
	return whole, h.Duration, errors.Join(h.Err, h.ReplyErr)
}

// sendTimeout ends a handoff that hangs.
const sendTimeout = 10 * time.Second

// send hands the namespace at path to whoever listens at socket, and returns the
// time from its write to the reply.
func send(socket, path string) (time.Duration, error) {
	ns, err := netns.Open(path)
	if err != nil {
		return 0, err
	}
	defer ns.Close()
	ctx, cancel := context.WithTimeout(context.Background(), sendTimeout)
	defer cancel()
	conn, _, err := uds.Dial(ctx, "unix", socket)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(sendTimeout))

	start := time.Now()
	if err := handoff.Send(conn, ns.FD()); err != nil {
		return 0, err
	}
	if err := handoff.ReadReply(conn); err != nil {
		return 0, err
	}
	return time.Since(start), nil
}
