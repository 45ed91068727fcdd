// hello answers every HTTP request with the machine that it runs on: kernel, hostname, uptime, and the request itself.
#include <arpa/inet.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <unistd.h>

static double uptime(void) {
	double up = 0;
	FILE *f = fopen("/proc/uptime", "r");
	if (f) {
		if (fscanf(f, "%lf", &up) != 1)
			up = 0;
		fclose(f);
	}
	return up;
}

static void answer(int conn) {
	char request[4096];
	size_t have = 0;
	while (have < sizeof request - 1) {
		ssize_t n = read(conn, request + have, sizeof request - 1 - have);
		if (n <= 0)
			break;
		have += n;
		request[have] = 0;
		if (strstr(request, "\r\n\r\n"))
			break;
	}
	request[have] = 0;
	char *line_end = strpbrk(request, "\r\n");
	if (line_end)
		*line_end = 0;

	struct utsname u;
	uname(&u);
	char body[8192], head[256];
	int length = snprintf(body, sizeof body, "%s\n\nkernel:   %s %s\nhostname: %s\nuptime:   %.2f s\nrequest:  %s\n", GREETING, u.sysname,
			      u.release, u.nodename, uptime(), request);
	int head_length = snprintf(head, sizeof head,
				   "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n",
				   length);
	if (write(conn, head, head_length) == head_length && write(conn, body, length) == length)
		printf("%s\n", request);
	close(conn);
}

int main(int argc, char **argv) {
	int port = argc > 1 ? atoi(argv[1]) : 8080, on = 1;
	setvbuf(stdout, NULL, _IOLBF, 0);
	signal(SIGPIPE, SIG_IGN);
	int listener = socket(AF_INET, SOCK_STREAM, 0);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = INADDR_ANY};
	if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 64)) {
		perror("hello: listening");
		return 1;
	}
	printf("listening on port %d\n", port);
	for (;;) {
		int conn = accept(listener, NULL, NULL);
		if (conn >= 0)
			answer(conn);
	}
}
