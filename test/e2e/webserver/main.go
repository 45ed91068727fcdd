// Command webserver is what the scripts' builds fetch from, on loopback: files and git repositories over HTTP, HTTPS with a certificate
// authority of its own, and git over SSH. As an HTTP proxy it answers for hosts that do not exist.
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/cgi"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"

	"golang.org/x/crypto/ssh"
)

func main() {
	if len(os.Args) != 5 {
		log.Fatal("usage: webserver DIR HTTP-PORT HTTPS-PORT SSH-PORT")
	}
	dir, err := filepath.Abs(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	for port, serve := range map[string]func(string, net.Listener) error{os.Args[2]: serveHTTP, os.Args[3]: serveHTTPS, os.Args[4]: serveSSH} {
		l, err := net.Listen("tcp", "127.0.0.1:"+port)
		if err != nil {
			log.Fatal(err)
		}
		go func() { log.Fatal(serve(dir, l)) }()
	}
	// The scripts wait for the last of the files that the servers write.
	for {
		if _, err := os.Stat(filepath.Join(dir, "key")); err == nil {
			if _, err := os.Stat(filepath.Join(dir, "ca.pem")); err == nil {
				break
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	fmt.Println("ready")
	if err := os.WriteFile(filepath.Join(dir, "ready"), nil, 0o644); err != nil {
		log.Fatal(err)
	}
	time.Sleep(5 * time.Minute) // the script ends it
}

func serveHTTP(dir string, l net.Listener) error {
	mux := http.NewServeMux()
	mux.Handle("/files/", http.StripPrefix("/files/", http.FileServer(http.Dir(filepath.Join(dir, "files")))))
	git, err := exec.LookPath("git")
	if err != nil {
		return err
	}
	mux.Handle("/git/", &cgi.Handler{
		Path: git, Args: []string{"http-backend"}, Root: "/git",
		Env: []string{"GIT_PROJECT_ROOT=" + filepath.Join(dir, "git"), "GIT_HTTP_EXPORT_ALL=1"},
	})
	mux.HandleFunc("/status/{code}", func(w http.ResponseWriter, r *http.Request) {
		var code int
		_, _ = fmt.Sscan(r.PathValue("code"), &code)
		w.WriteHeader(code)
	})
	return (&http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Host == "" { // no proxy request
			mux.ServeHTTP(w, r)
			return
		}
		fmt.Fprintf(w, "proxied %s\n", r.URL)
	})}).Serve(l)
}

func serveHTTPS(dir string, l net.Listener) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Atoll test authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "ca.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		return err
	}
	server := &http.Server{
		ReadHeaderTimeout: time.Minute, Handler: http.FileServer(http.Dir(filepath.Join(dir, "files"))), ErrorLog: log.New(io.Discard, "", 0),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
	}
	return server.ServeTLS(l, "", "")
}

var uploadPack = regexp.MustCompile(`^git-upload-pack '/?([\w./-]+)'$`)

// serveSSH lets in the one key that it has made, for git-upload-pack alone.
func serveSSH(dir string, l net.Listener) error {
	user, userPEM, err := sshKey()
	if err != nil {
		return err
	}
	host, _, err := sshKey()
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "key"), userPEM, 0o600); err != nil {
		return err
	}
	config := &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, k ssh.PublicKey) (*ssh.Permissions, error) {
		if string(k.Marshal()) != string(user.PublicKey().Marshal()) {
			return nil, errors.New("unknown key")
		}
		return nil, nil
	}}
	config.AddHostKey(host)
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			_, channels, requests, err := ssh.NewServerConn(conn, config)
			if err != nil {
				return
			}
			go ssh.DiscardRequests(requests)
			for c := range channels {
				go serveChannel(dir, c)
			}
		}()
	}
}

func serveChannel(dir string, c ssh.NewChannel) {
	ch, requests, err := c.Accept()
	if err != nil {
		return
	}
	defer ch.Close()
	for r := range requests {
		var command struct{ Line string }
		if r.Type != "exec" || ssh.Unmarshal(r.Payload, &command) != nil {
			_ = r.Reply(r.Type == "env", nil)
			continue
		}
		m := uploadPack.FindStringSubmatch(command.Line)
		_ = r.Reply(m != nil, nil)
		if m == nil {
			return
		}
		cmd := exec.Command("git-upload-pack", filepath.Join(dir, "git", filepath.Clean("/"+m[1])))
		cmd.Stdin, cmd.Stdout, cmd.Stderr = ch, ch, ch.Stderr()
		var status struct{ Code uint32 }
		if cmd.Run() != nil {
			status.Code = 1
		}
		_, _ = ch.SendRequest("exit-status", false, ssh.Marshal(&status))
		return
	}
}

func sshKey() (ssh.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		return nil, nil, err
	}
	block, err := ssh.MarshalPrivateKey(key, "atoll test")
	if err != nil {
		return nil, nil, err
	}
	return signer, pem.EncodeToMemory(block), nil
}
