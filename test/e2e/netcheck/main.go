// Command netcheck is the scripts' network client: it fetches a page or sends a datagram and prints the answer.
package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "netcheck:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "get":
		c := http.Client{Timeout: 5 * time.Second}
		res, err := c.Get(args[1])
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if res.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", args[1], res.Status)
		}
		_, err = io.Copy(os.Stdout, res.Body)
		return err
	case len(args) == 3 && args[0] == "udp":
		conn, err := net.Dial("udp", args[1])
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
		if _, err := io.WriteString(conn, args[2]); err != nil {
			return err
		}
		buf := make([]byte, 65536)
		n, err := conn.Read(buf)
		if err != nil {
			return err
		}
		_, err = os.Stdout.Write(buf[:n])
		return err
	}
	return fmt.Errorf("usage: netcheck get URL | udp ADDRESS TEXT")
}
