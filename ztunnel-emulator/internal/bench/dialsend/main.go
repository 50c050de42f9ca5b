// Command dialsend is what a Go program has to do to hand over a namespace, and
// nothing else: dial, send one byte and the descriptor, read the reply. The
// benchmark holds cni-emulator against it.
//
// It uses package net, as one would. With bare system calls it takes about a
// tenth less time, because package net needs not be started.
package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
)

// main hands the namespace at the second argument to the socket at the first.
func main() {
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "dialsend:", err)
		os.Exit(1)
	}
}

func run(socket, namespace string) error {
	ns, err := os.Open(namespace)
	if err != nil {
		return err
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: socket})
	if err != nil {
		return err
	}
	if _, _, err := conn.WriteMsgUnix([]byte{1}, syscall.UnixRights(int(ns.Fd())), nil); err != nil {
		return err
	}
	reply := []byte{1} // an end without a reply is a failure
	if _, err := conn.Read(reply); err != nil {
		return err
	}
	if reply[0] != 0 {
		return errors.New("refused")
	}
	return nil
}
