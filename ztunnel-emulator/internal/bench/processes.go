package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// processes is what a whole process costs, from fork to exit: (d).
type processes struct {
	floor trial // the program that only dials, sends and reads the reply
	cni   trial // cni-emulator
}

// measureProcesses hands over every pod with cni-emulator, and as many other
// namespaces with the floor program, in turns, to one receiver.
func measureProcesses(ctx context.Context, o options, w *world) (processes, error) {
	var p processes
	r, err := startReceiver(ctx, o.ztunnel, w)
	if err != nil {
		return p, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return p, errors.Join(err, r.stop())
	}
	defer null.Close()

	var floorTimes, cniTimes samples
	for i := range w.pods {
		runs := []struct {
			program, path string
			times         *samples
		}{
			{o.dialsend, w.floor[i], &floorTimes},
			{o.cni, w.pods[i], &cniTimes},
		}
		if i%2 == 1 { // nobody is always the one who comes after the other
			runs[0], runs[1] = runs[1], runs[0]
		}
		for _, it := range runs {
			took, err := runProcess(null, it.program, w.socket(), it.path)
			if err != nil {
				return p, errors.Join(err, r.stop())
			}
			*it.times = append(*it.times, took)
		}
	}
	p.floor.add(floorTimes)
	p.cni.add(cniTimes)
	return p, r.stop()
}

// runProcess runs a program to its end and returns how long that took. It must
// exit 0.
func runProcess(null *os.File, program string, args ...string) (time.Duration, error) {
	attr := &os.ProcAttr{Files: []*os.File{null, null, os.Stderr}}
	start := time.Now()
	proc, err := os.StartProcess(program, append([]string{program}, args...), attr)
	if err != nil {
		return 0, err
	}
	state, err := proc.Wait()
	took := time.Since(start)
	if err == nil && !state.Success() {
		err = fmt.Errorf("%s: %v", program, state)
	}
	return took, err
}
