package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"time"

	"ambient-emulator/internal/handoff"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/uds"
	"ambient-emulator/ztunnel-emulator/internal/inpod"
)

// handoffs is what handing over costs inside one process, over a real socket.
type handoffs struct {
	floor    trial // (a) bare system calls
	receiver trial // (b) from the descriptor received to the reply written
	whole    trial // (c) from the sender's write to the sender's reply
}

// measureHandoffs hands over every pod in every round, to a fresh receiver each
// round, and between them has the floor visit as many namespaces of its own.
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
	r, err := startInside(w.socket())
	if err != nil {
		return err
	}
	f := newFloor()
	var floorTimes, receiverTimes, wholeTimes samples
	for i := 0; i < len(w.pods) && err == nil; i += turns {
		if err = ctx.Err(); err != nil {
			break
		}
		end := min(i+turns, len(w.pods))
		var took samples
		if took, err = f.visit(w.floor[i:end]); err != nil {
			break
		}
		floorTimes = append(floorTimes, took...)
		for _, path := range w.pods[i:end] {
			var whole, alone time.Duration
			if whole, alone, err = r.handOver(path); err != nil {
				break
			}
			wholeTimes = append(wholeTimes, whole)
			receiverTimes = append(receiverTimes, alone)
		}
	}
	f.close()
	if err := errors.Join(err, r.stop()); err != nil {
		return err
	}
	h.floor.add(floorTimes)
	h.receiver.add(receiverTimes)
	h.whole.add(wholeTimes)
	return nil
}

// inside is a receiver in this process, as ztunnel-emulator's command line
// makes one.
type inside struct {
	pods     *inpod.Pods
	listener *uds.Listener
	cancel   context.CancelFunc
	served   chan error
	reports  chan inpod.Handoff
	null     *os.File
}

func startInside(socket string) (*inside, error) {
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
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
	r := &inside{pods: pods, listener: l, served: make(chan error, 1), reports: make(chan inpod.Handoff, 1), null: null}
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

func (r *inside) stop() error {
	r.cancel()
	return errors.Join(<-r.served, r.listener.Close(), r.pods.Close(), r.null.Close())
}

// handOver hands over the namespace at path, and returns what the sender and
// what the receiver measured.
func (r *inside) handOver(path string) (whole, alone time.Duration, err error) {
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
