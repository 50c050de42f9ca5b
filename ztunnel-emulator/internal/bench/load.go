package main

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// load is how a receiver's process fares when so many send at once.
type load struct {
	senders int
	rounds  []loadRound
}

type loadRound struct {
	perSecond  float64 // pods
	bytesAPod  float64 // of resident memory
	filesInAll int     // descriptors that the pods have added
}

// measureLoad hands every pod to a fresh ztunnel-emulator, in every round.
func measureLoad(ctx context.Context, o options, w *world, senders int) (load, error) {
	l := load{senders: senders}
	for range o.loads {
		r, err := startReceiver(ctx, o.ztunnel, w)
		if err != nil {
			return l, err
		}
		round, err := oneLoad(r, w, senders)
		if err := errors.Join(err, r.stop()); err != nil {
			return l, err
		}
		l.rounds = append(l.rounds, round)
	}
	return l, nil
}

func oneLoad(r *process, w *world, senders int) (loadRound, error) {
	before, err1 := r.look()
	took, err2 := sendAll(w, senders)
	after, err3 := r.look()
	n := float64(len(w.pods))
	return loadRound{
		perSecond:  n / took.Seconds(),
		bytesAPod:  float64(after.resident-before.resident) / n,
		filesInAll: after.files - before.files,
	}, errors.Join(err1, err2, err3)
}

// sendAll hands over every pod, by so many senders, and returns how long it took.
func sendAll(w *world, senders int) (time.Duration, error) {
	var next atomic.Int64
	errs := make([]error, senders)
	var wg sync.WaitGroup
	start := time.Now()
	for s := range senders {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(w.pods) || errs[s] != nil {
					return
				}
				_, errs[s] = send(w.socket(), w.pods[i])
			}
		})
	}
	wg.Wait()
	return time.Since(start), errors.Join(errs...)
}
